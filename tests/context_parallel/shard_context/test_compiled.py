"""torch.compile and `pypar.shard_context`: compiled before the block, in it or around it, attention is the whole's."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pypar
from pypar.mesh import Axis

WIDTH, HEADS, LENGTH = 16, 4, 10


class Model(nn.Module):
    """Attention by torch's function, by ours and by torch's layer."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, -1)).chunk(3, -1)
        x = x + pypar.attention(q, k, v, causal=True).flatten(2)
        heads_first = (y.transpose(1, 2) for y in (q * 2, k, v))
        x = x + F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.layer(x, x, x, need_weights=False)[0]


def model_of():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def x_of():
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def results(model, x):
    """(out, gradients of all weights) of a loss that is a sum over positions."""
    for p in model.parameters():
        p.grad = None
    out = model(x)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in model.parameters()]


def _over(communication, backend, when):
    """Outcomes of the compiled model: in the block, after it, in it again."""
    axis = Axis.of(dist.new_group(backend=communication), "cp")
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend=backend)
    mine = pypar.context_parallel.shard(x_of(), 1, axis, "zigzag")
    if when == "compiled before":
        compiled(mine)
    with pypar.shard_context(axis) as context:
        inside = [results(compiled, mine)]
    local = compiled(mine).detach()
    with context:
        inside.append(results(compiled, mine))
    return [(context.unshard(out, 1), gradients) for out, gradients in inside], local, model(mine).detach()


@pytest.mark.parametrize(
    ("communication", "backend", "when"),
    [
        ("gloo", "aot_eager", "compiled before"),
        pytest.param(
            "pypar", "eager", "compiled inside", marks=pytest.mark.slow
        ),  # as the next test's function
    ],
)
def test_a_compiled_model_runs_over_the_group_inside_and_alone_outside(ranks, communication, backend, when):
    outcome = ranks(2, _over, communication, backend, when, timeout_s=120)
    out, gradients = results(model_of(), x_of())
    for inside, local, alone in outcome:
        for whole, _ in inside:
            torch.testing.assert_close(whole, out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(local, alone, rtol=1e-4, atol=1e-5)
    for time in (0, 1):
        shares = zip(*(inside[time][1] for inside, *_ in outcome), strict=True)
        for gradient, of_ranks in zip(gradients, shares, strict=True):
            torch.testing.assert_close(sum(of_ranks), gradient, rtol=1e-3, atol=1e-4)


def _entered(communication):
    axis = Axis.of(dist.new_group(backend=communication), "cp")
    torch._dynamo.reset()
    model = model_of()

    @torch.compile(backend="eager")
    def step(x):
        with pypar.shard_context(axis):
            return model(x)

    part = pypar.context_parallel.shard(x_of(), 1, axis, "zigzag")
    return pypar.context_parallel.unshard(step(part).detach(), 1, axis, "zigzag")


def test_a_compiled_function_that_enters_the_block(ranks):
    out, _ = results(model_of(), x_of())
    for whole in ranks(2, _entered, "pypar", timeout_s=120):
        torch.testing.assert_close(whole, out, rtol=1e-4, atol=1e-5)


def test_a_whole_graph_is_refused():
    with pypar.shard_context(Axis.single("cp")):
        compiled = torch.compile(
            lambda x: F.scaled_dot_product_attention(x, x, x), backend="eager", fullgraph=True
        )
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
            compiled(x_of()[:, None])


def test_a_default_device_leaves_a_whole_graph_whole():
    compiled = torch.compile(lambda q: pypar.attention(q, q, q), backend="eager", fullgraph=True)
    q = x_of().unflatten(-1, (HEADS, -1))
    with torch.device("cpu"):
        torch.testing.assert_close(compiled(q), pypar.attention(q, q, q))
