"""Every public function of the rooms as code that a user compiles: what test_compiled.py runs eagerly and compiled.

A case is made for an axis of ranks and gives (function, its inputs for a sequence length, a module or None whose
gradients are compared too).
"""

import importlib

import torch
import torch.distributed as dist
from torch import nn

import pypar
from pypar import comm
from pypar.ops.attention import attention_backward, attention_forward
from pypar.ops.attention.arguments import attention_problem
from pypar.ops.bucket import bucket, move
from pypar.ops.gated import clamped_swiglu, geglu, swiglu
from pypar.ops.linear import linear_forward, linear_input_gradient, linear_weight_gradient
from pypar.selftest.case import Draw

WIDTH, FEATURES, VOCABULARY = 8, 16, 24
CASES = {}


def case(*names):
    """These names of the rooms' __all__ are called in the case that the decorated function makes."""

    def register(make):
        CASES.update(dict.fromkeys(names, make))
        return make

    return register


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def of_x(function, module=None):
    """A case whose one input is x [2, length, 8], other values on each rank; the graph goes on around the function."""
    rank = dist.get_rank() if dist.is_initialized() else 0

    def run(x):
        return function(x * 2) + 1

    return run, lambda length: (numbers(2, length, WIDTH, seed=rank),), module


def of_case_file(op, start=0):
    """A case of what the operator's file of cases draws: for each length another size of the kind of case `start`."""
    first, *others = importlib.import_module(f"pypar.selftest.cases.{op}").cases(False)[start:]
    sizes = [first, *(each for each in others if each.ours is first.ours)]

    def make(axis):
        drawn = [each.inputs(Draw("cpu", torch.float32, 1)) for each in sizes]
        alike = [inputs for inputs in drawn if list(inputs) == list(drawn[0])]

        def run(*given):
            return first.ours(**dict(zip(drawn[0], given, strict=True)), backend=None)

        return run, lambda length: tuple(alike[length // 2 % len(alike)].values()), None

    make.__name__ = f"_{op}"
    return make


# ---- ops


def heads(x):
    return x.unflatten(-1, (2, -1))


@case("pypar.ops.attention")
def _attention(axis):
    return of_x(lambda x: pypar.attention(heads(x), heads(x) * 0.5, heads(x), causal=True, window=(3, None)))


@case("pypar.scaled_dot_product_attention")
def _scaled_dot_product_attention(axis):
    return of_x(lambda x: pypar.scaled_dot_product_attention(x, x[..., 1:, :], x[..., 1:, :], is_causal=True))


@case("pypar.ops.attention.attention_forward", "pypar.ops.attention.attention_backward")
def _attention_by_hand(axis):
    def run(x):
        problem = attention_problem(heads(x), heads(x * 3), heads(x * 5), causal=True)
        out, lse = attention_forward(problem)
        return sum(attention_backward(problem, out.square(), out, lse))

    return run, lambda length: (numbers(2, length, WIDTH),), None


@case("pypar.ops.cross_entropy")
def _cross_entropy(axis):
    return (
        lambda x, ids: pypar.ops.cross_entropy(x * 2, ids) + 1,
        lambda n: (numbers(n, VOCABULARY), tokens(n)),
        None,
    )


@case("pypar.ops.linear")
def _linear(axis):
    layer = nn.Linear(WIDTH, FEATURES)
    return of_x(lambda x: pypar.ops.linear(x, layer.weight, layer.bias), layer)


@case(
    "pypar.ops.linear.linear_forward",
    "pypar.ops.linear.linear_input_gradient",
    "pypar.ops.linear.linear_weight_gradient",
)
def _linear_by_hand(axis):
    weight = numbers(FEATURES, WIDTH)

    def run(x):
        out = linear_forward(x, weight)
        return linear_input_gradient(out, weight) + linear_weight_gradient(out, x).sum()

    return of_x(run)


@case("pypar.ops.linear_cross_entropy")
def _linear_cross_entropy(axis):
    weight = numbers(VOCABULARY, WIDTH)
    return (
        lambda x, ids: pypar.ops.linear_cross_entropy(x * 2, weight, ids) + 1,
        lambda n: (numbers(n, WIDTH), tokens(n)),
        None,
    )


@case("pypar.ops.LayerNorm", "pypar.ops.RMSNorm")
def _norm_layers(axis):
    layers = nn.Sequential(pypar.ops.LayerNorm(WIDTH), pypar.ops.RMSNorm(WIDTH, weight_offset=1.0))
    return of_x(layers, layers)


@case("pypar.ops.rope", "pypar.ops.rope_tables", "pypar.ops.rope_frequencies")
def _rope(axis):
    parameters = {"rope_theta": 10000.0}
    factor = pypar.ops.rope_frequencies(parameters, WIDTH // 2)[1]

    def run(x):
        tables = pypar.ops.rope_tables(parameters, WIDTH // 2, x.shape[1])
        return pypar.ops.rope(heads(x * factor), *tables) + 1

    return of_x(run)


@case("pypar.ops.swiglu", "pypar.ops.geglu", "pypar.ops.clamped_swiglu")
def _gated(axis):
    return of_x(lambda x: geglu(swiglu(x, x * 3)) + clamped_swiglu(x, interleaved=True))


@case("pypar.ops.bucket.bucket", "pypar.ops.bucket.move")
def _bucket(axis):
    def run(x):
        out, moved = torch.empty_like(x), torch.empty_like(x)
        bucket(x.detach() * 3, 0.5, out=out)
        move(out, moved)
        return moved * 2

    return (
        run,
        lambda length: (numbers(2, length, 1 << 15).detach(),),
        None,
    )  # large enough to pass the caches by


# ---- optimizers


@case("pypar.AdamW", "pypar.Muon")
def _optimizers(axis):
    """Without momentum, so that an update does not depend on those before it."""
    weight = nn.Parameter(torch.ones(2, WIDTH))
    optimizers = [pypar.AdamW([weight], lr=0.1, betas=(0.0, 0.0)), pypar.Muon([weight], lr=0.1, momentum=0.0)]

    def run(x):
        y = x.sum(1).detach() * 2
        for optimizer in optimizers:
            with torch.no_grad():
                weight.fill_(1.0)
            weight.grad = y.sin()
            optimizer.step()
            y = y + weight.detach() * 3
        return y

    return run, lambda length: (numbers(2, length, WIDTH),), None


# ---- comm


@case("pypar.comm.all_reduce_start", "pypar.comm.Handle")
def _all_reduce_start(axis):
    def run(x):
        handle = comm.all_reduce_start(x.detach() * 2, axis)
        meanwhile = x.sin()
        total = handle.wait()
        return total + meanwhile * handle.is_done()

    return of_x(run)


@case("pypar.comm.all_gather_start")
def _all_gather_start(axis):
    return of_x(lambda x: comm.all_gather_start(x, axis, 1).wait())


@case("pypar.comm.reduce_scatter_start")
def _reduce_scatter_start(axis):
    return of_x(lambda x: comm.reduce_scatter_start(x, axis, -1).wait())


@case("pypar.comm.copy_to", "pypar.comm.reduce_from")
def _copy_to(axis):
    return of_x(lambda x: comm.reduce_from(comm.copy_to(x, axis).sin(), axis))


@case("pypar.comm.gather_from", "pypar.comm.reduce_scatter_to")
def _gather_from(axis):
    return of_x(lambda x: comm.reduce_scatter_to(comm.gather_from(x, axis, 1).sin(), axis, 1))


@case("pypar.comm.split_to", "pypar.comm.gather_replicated", "pypar.comm.local_slice")
def _split_to(axis):
    def run(x):
        return comm.gather_replicated(comm.split_to(x, axis, -1).sin(), axis, 0) + comm.local_slice(
            x, axis, -1
        )

    return of_x(lambda x: run(x[:1]))


@case("pypar.comm.send_start", "pypar.comm.receive_start")
def _send_start(axis):
    def run(x):
        sent = comm.send_start(x, 1 - axis.rank, axis)
        received = comm.receive_start(x.shape, x.dtype, x.device, 1 - axis.rank, axis).wait()
        sent.wait()
        return received * 2 + x

    return of_x(run)


@case("pypar.comm.exchange_start")
def _exchange_start(axis):
    def run(x):
        into = torch.empty_like(x)
        (sent,), (received,) = comm.exchange_start([(x, 1 - axis.rank)], [(into, 1 - axis.rank)], axis)
        sent.wait()
        return received.wait() * 2 + x

    return of_x(run)


@case("pypar.comm.shared_empty", "pypar.comm.shares_memory")
def _shared_empty(axis):
    def run(x):
        flat = comm.shared_empty(x.numel(), x.dtype, axis).copy_(x.detach().flatten())
        return comm.all_reduce_start(flat, axis).wait().clone() * comm.shares_memory(axis)

    return of_x(run)


@case("pypar.comm.Traffic", "pypar.comm.wire_bytes")
def _traffic(axis):
    def run(x):
        traffic = comm.Traffic("counted")
        traffic.record("all_gather", comm.wire_bytes("all_gather", x.numel() * x.element_size(), axis.size))
        return x * traffic.bytes_sent

    return of_x(run)


@case("pypar.comm.PeerAllReduce")
def _peer_all_reduce(axis):
    peers = comm.PeerAllReduce(axis.group)

    def run(x):
        return peers.all_reduce(x.detach()) * (peers.method(x.detach())[0] == "group") + x

    return of_x(run)


case("pypar.ops.moe_combine")(of_case_file("moe_permute", start=1))
# An operator of which nothing is said above is called as its file of cases calls it.
for _op in pypar.ops.__all__:
    if f"pypar.ops.{_op}" not in CASES:
        case(f"pypar.ops.{_op}")(of_case_file(_op))
