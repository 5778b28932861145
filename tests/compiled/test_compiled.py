"""torch.compile around every public function: the eager values, gradients and traffic, also when lengths change.

The long tests add inductor between ranks and more functions whose shapes become symbolic over gloo.
"""

import importlib

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import pypar
import tests.compiled.memory  # noqa: F401 - registers its cases
from pypar import comm, ring_attention
from pypar.comm.collectives import _all_gather
from pypar.mesh import Axis
from tests.compiled.cases import CASES, numbers
from tests.compiled.engines import Mlp, parallel_mlp, seeded

ROOMS = ("ops", "comm", "parallel", "tensor_parallel", "context_parallel", "data_parallel", "recomputation")
# Made, and called, before a model runs.
BEFORE = {
    "Mesh",
    "register_with_transformers",
    "parallel.ParallelPlan",
    "parallel.fill",
    "parallel.materialize",
}
LENGTHS = (4, 6, 10)  # the first is compiled for itself, the second for any length


def public_names():
    """Functions and classes of the rooms' __all__, and what else the package itself shows."""
    found = set()
    for room in ROOMS:
        module = importlib.import_module(f"pypar.{room}")
        found |= {f"pypar.{room}.{name}" for name in module.__all__ if callable(getattr(module, name))}
    shown = {id(getattr(pypar, name)): name for name in pypar.__all__ if callable(getattr(pypar, name))}
    of_rooms = {id(_named(name)) for name in found}
    return (found | {f"pypar.{n}" for i, n in shown.items() if i not in of_rooms}) - {
        f"pypar.{n}" for n in BEFORE
    }


def _named(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_public_function_has_a_case():
    missing = public_names() - set(CASES)
    assert not missing, f"{sorted(missing)} need a case that calls them compiled"


def outcome(run, inputs, module=None):
    """(tensors that come out, gradients of the inputs and of the module's parameters)."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    parameters = [] if module is None else list(module.parameters())
    for p in parameters:
        p.grad = None
    outs = [x for x in _pytree.tree_leaves(run(*leaves)) if isinstance(x, torch.Tensor)]
    differentiable = [x for x in outs if x.requires_grad]
    if differentiable:
        sum(x.square().sum() for x in differentiable).backward()
    gradients = [x.grad for x in (*leaves, *parameters)]
    return [x.detach().clone() for x in outs], [None if g is None else g.clone() for g in gradients]


def compare(make, axis, backend, **options):
    """Eager and compiled outcomes of one case for several lengths, with one compiled function."""
    torch._dynamo.reset()
    run, inputs_of, module = make(axis)
    outcome(run, inputs_of(LENGTHS[0]), module)  # what only a first call does
    compiled = torch.compile(run, backend=backend, **options)
    for length in LENGTHS:
        seen = []
        for function in (run, compiled):
            before = axis.traffic.snapshot()
            seen.append(outcome(function, inputs_of(length), module))
            after = axis.traffic.snapshot()
            seen[-1] += (
                after.bytes_sent - before.bytes_sent,
                sum(after.calls.values()) - sum(before.calls.values()),
            )
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)


OF_RANKS = sorted(
    {make.__name__ for name, make in CASES.items() if not name.startswith(("pypar.ops", "pypar.scaled"))}
)
OF_ONE = sorted({make.__name__ for make in CASES.values()} - set(OF_RANKS))


def made_by(name):
    return next(make for make in CASES.values() if make.__name__ == name)


@pytest.mark.parametrize("name", OF_ONE)
def test_an_operator(name):
    compare(made_by(name), Axis.single("none"), "aot_eager")


def _between_ranks(name, transport, backend, options):
    compare(made_by(name), Axis.of(dist.new_group(backend=transport), "tp"), backend, **options)


@pytest.mark.parametrize("name", OF_RANKS)
def test_between_ranks(ranks, name):
    ranks(2, _between_ranks, name, "pypar", "eager", {"dynamic": True}, timeout_s=120)


@pytest.mark.parametrize(
    ("name", "transport"),
    [
        ("_parallelize", "pypar"),
        ("_gather_from", "gloo"),
        pytest.param("_parallelize", "gloo", marks=pytest.mark.slow),
        pytest.param("_all_reduce_start", "gloo", marks=pytest.mark.slow),
        pytest.param("_ring_attention", "gloo", marks=pytest.mark.slow),
    ],
)
def test_the_second_length_makes_shapes_symbolic(ranks, name, transport):
    ranks(2, _between_ranks, name, transport, "aot_eager", {}, timeout_s=120)


@pytest.mark.slow  # inductor's C++ compiler runs for each graph
def test_inductor_between_ranks(ranks):
    ranks(2, _between_ranks, "_parallelize", "pypar", "inductor", {}, timeout_s=300)


def test_inductor():
    """Of the operators together, which it fuses around."""
    angles = numbers(6, 2)

    def block(x):
        y = pypar.ops.rms_norm(x, torch.ones(8))
        q = pypar.ops.rope(y.unflatten(-1, (2, 4)), angles.cos(), angles.sin())
        return x + pypar.ops.swiglu(pypar.attention(q, q, q * 2, causal=True).flatten(2), y)

    torch._dynamo.reset()
    x = numbers(2, 6, 8)
    seen = [outcome(f, (x,)) for f in (torch.compile(block, fullgraph=True), block)]
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)


# ---- what else a user's script does


def _compare(run, length=6, module=None):
    torch._dynamo.reset()
    inputs = (numbers(2, length, 8),)
    seen = [outcome(f, inputs, module) for f in (torch.compile(run, backend="eager"), run)]
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)
    return seen[0]


def _around_layers():
    axis = Axis.of(dist.group.WORLD, "tp")
    model = parallel_mlp(axis)

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x) * 2

    _compare(cast, module=model)
    with torch.autocast("cpu", torch.bfloat16):
        _compare(lambda x: model.get_submodule("0.up_proj")(x * 2))
    for reentrant in (False, True):
        _compare(lambda x, r=reentrant: checkpoint(model, x * 2, use_reentrant=r) + 1, module=model)
    with torch.no_grad():
        _compare(lambda x: model(x * 2) + 1)

    def step(x):
        model.zero_grad()
        model(x.detach()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    assert len(_compare(step)[0]) == 6

    def collectives(x):
        y, rank = x.detach() * 2, dist.get_rank()
        work, z = dist.all_reduce(y, async_op=True), x.sin()
        work.wait()
        whole, received = torch.empty(2 * y.numel()), torch.empty_like(y)
        _all_gather(whole, y.view(-1), async_op=True).wait()
        sent = dist.isend(y, 1 - rank)
        dist.irecv(received, 1 - rank).wait()
        sent.wait()
        dist.barrier()
        return y + z, whole + 1, received

    _compare(collectives)


def test_around_layers(ranks):
    """Autocast, checkpoints, a whole step, torch's own started collectives: graphs break there, values are right."""
    ranks(2, _around_layers, timeout_s=120)


def _data_parallel():
    axis = Axis.of(dist.group.WORLD, "data")
    model = pypar.DataParallel(seeded(Mlp), axis, bucket_bytes=256, first_bucket_bytes=64)
    inside = pypar.DataParallel(torch.compile(seeded(Mlp), backend="aot_eager"), axis)
    x = (numbers(2, 6, 8, seed=axis.rank),)
    expected = outcome(model, x, model)
    torch.testing.assert_close(outcome(torch.compile(model, backend="aot_eager"), x, model), expected)
    torch.testing.assert_close(outcome(inside, x, inside), expected)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.testing.assert_close(outcome(torch.compile(model, backend="aot_eager"), x, model), expected)


def test_data_parallel(ranks):
    """The wrapper compiled, what it wraps compiled, backward compiled too."""
    ranks(2, _data_parallel, timeout_s=120)


def _refused():
    axis = Axis.of(dist.group.WORLD, "tp")
    model, x = parallel_mlp(axis), numbers(2, 6, 8)
    q = numbers(1, 6, 2, 8)
    torch._dynamo.reset()
    for whole in (
        model,
        lambda x: comm.copy_to(x * 2, axis),
        lambda x: ring_attention(q * x.sum(), q, q, axis),
    ):
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="between ranks; compile without fullgraph=True"
        ):
            torch.compile(whole, backend="eager", fullgraph=True)(x)
    for transformed in (
        lambda: torch.func.grad(lambda q: ring_attention(q, q, q, axis).sum())(q),
        lambda: torch.vmap(lambda q: ring_attention(q, q, q, axis))(q[None]),
        lambda: torch.vmap(model)(x),
        lambda: torch.func.jvp(model, (x,), (x,)),
        lambda: torch.func.grad(lambda x: comm.reduce_from(x, axis).sum())(x),
        lambda: torch.func.grad(lambda x: pypar.DataParallel(seeded(Mlp), axis)(x).sum())(x),
    ):
        with pytest.raises(ValueError, match="which torch.func's transforms .* do not pass through"):
            transformed()
    with pytest.raises(ValueError, match="export the model as it is before it is spread over ranks"):
        torch.export.export(model, (x,))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    with pytest.raises(ValueError, match="a FakeTensor of shape .* has no memory"):
        comm.all_reduce_start(fake, axis)
    torch.testing.assert_close(comm.all_reduce_start(x.clone(), axis).wait(), x * 2)  # the group goes on


def test_what_cannot_be_is_a_sentence(ranks):
    ranks(2, _refused, timeout_s=120)
