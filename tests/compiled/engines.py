"""The engines as code that a user compiles; see cases.py."""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pypar
from pypar import context_parallel, parallel, tensor_parallel
from pypar.context_parallel.auto.volume import Sizes
from pypar.context_parallel.layouts import segments_of
from pypar.context_parallel.masks import Mask
from pypar.cost.machine import MachineCosts
from pypar.mesh import Mesh
from tests import ROOT
from tests.compiled.cases import FEATURES, VOCABULARY, WIDTH, case, heads, numbers, of_x, tokens

# ---- tensor_parallel


def seeded(module, *arguments, **options):
    torch.manual_seed(0)
    return module(*arguments, **options)


@case("pypar.tensor_parallel.ColumnParallelLinear")
def _column(axis):
    layer = seeded(tensor_parallel.ColumnParallelLinear, WIDTH, FEATURES, axis, bias=True, gather_output=True)
    return of_x(layer, layer)


@case("pypar.tensor_parallel.RowParallelLinear")
def _row(axis):
    layer = seeded(tensor_parallel.RowParallelLinear, 2 * WIDTH, FEATURES, axis, bias=True)
    return of_x(layer, layer)


@case("pypar.tensor_parallel.column_parallel", "pypar.tensor_parallel.row_parallel")
def _functions_of_linear_layers(axis):
    layer = nn.Module()
    layer.up, layer.gate, layer.down = (nn.Parameter(numbers(WIDTH, WIDTH, seed=s)) for s in range(3))

    def run(x):
        up, gate = tensor_parallel.column_parallel(x, (layer.up, layer.gate), axis)
        return tensor_parallel.row_parallel(F.silu(gate) * up, layer.down, axis)

    return of_x(run, layer)


@case("pypar.tensor_parallel.VocabParallelEmbedding")
def _embedding(axis):
    layer = seeded(tensor_parallel.VocabParallelEmbedding, VOCABULARY, WIDTH, axis, padding_idx=0)
    return lambda ids: layer(ids * 1) * 2, lambda length: (tokens(2, length),), layer


@case("pypar.tensor_parallel.VocabParallelHead")
def _head(axis):
    layer = seeded(tensor_parallel.VocabParallelHead, WIDTH, VOCABULARY, axis, bias=True)

    def run(hidden, ids):
        return layer(hidden * 2, ids) + 1

    return run, lambda n: (numbers(n, WIDTH), tokens(n)), layer


@case("pypar.tensor_parallel.vocab_parallel_cross_entropy")
def _vocab_parallel_cross_entropy(axis):
    def run(logits, ids):
        return tensor_parallel.vocab_parallel_cross_entropy(logits * 2, ids, axis) + 1

    part = VOCABULARY // axis.size
    return run, lambda n: (numbers(n, part, seed=axis.rank), tokens(n)), None


@case("pypar.linear_cross_entropy")
def _linear_cross_entropy_over_a_group(axis):
    layer = nn.Module()
    layer.weight = nn.Parameter(numbers(VOCABULARY // axis.size, WIDTH, seed=axis.rank))

    def run(hidden, ids):
        return pypar.linear_cross_entropy(hidden * 2, layer.weight, ids, group=axis) + 1

    return run, lambda n: (numbers(n, WIDTH), tokens(n)), layer


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


def parallel_mlp(axis):
    """A model that `parallelize` has cut; the mesh is of all ranks, over the default group's backend."""
    mesh = Mesh(tp=dist.get_world_size())
    object.__setattr__(mesh.tp, "group", axis.group)
    model = seeded(lambda: nn.Sequential(Mlp()))
    return pypar.parallelize(model, mesh, parallel.plan_of(model))


@case("pypar.parallel.parallelize", "pypar.parallel.plan_of")
def _parallelize(axis):
    model = parallel_mlp(axis)
    return lambda x: model(x) + 1, lambda length: (numbers(2, length, WIDTH),), model


@case("pypar.apply_fused")
def _apply_fused(axis):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": FEATURES, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = seeded(lambda: LlamaForCausalLM(config))
    pypar.apply_fused(model)
    return lambda x: model(inputs_embeds=x).logits + 1, lambda length: (numbers(2, length, WIDTH),), model


# ---- context_parallel


@case("pypar.context_parallel.ring_attention")
def _ring_attention(axis):
    return of_x(lambda x: pypar.ring_attention(heads(x), heads(x) * 0.5, heads(x), axis, causal=True))


@case("pypar.context_parallel.shard", "pypar.context_parallel.unshard", "pypar.context_parallel.positions")
def _shard(axis):
    def run(x):
        here = context_parallel.positions(x.shape[1], axis, "zigzag")
        part = context_parallel.shard(x, 1, axis, "zigzag") * here[:, None]
        return context_parallel.unshard(part, 1, axis, "zigzag", x.shape[1])

    return of_x(run)


@case("pypar.shard_context")
def _shard_context(axis):
    def run(x):
        context = pypar.shard_context(axis)
        with context:
            out = pypar.attention(heads(x), heads(x), heads(x), causal=True)
            return context.unshard(out, 1)

    return of_x(run)


@case(
    "pypar.context_parallel.method_costs",
    "pypar.context_parallel.measure_costs",
)
def _costs(axis):
    measured = context_parallel.measure_costs(axis)

    def run(x):
        costs = context_parallel.measure_costs(axis)
        held = tuple(segments_of(4 * x.shape[1], rank, axis.size, "zigzag") for rank in range(axis.size))
        table = context_parallel.method_costs(
            Sizes(2, 2, 2, 4, 4, x.dtype),
            held,
            held,
            Mask(0, 0, (0, 4 * x.shape[1]), (0, 4 * x.shape[1])),
            costs,
        )
        return x * len(table) * isinstance(costs, MachineCosts)

    assert isinstance(measured, MachineCosts)
    return of_x(run)


# ---- data_parallel


@case("pypar.data_parallel.DataParallel")
def _data_parallel(axis):
    model = pypar.DataParallel(seeded(Mlp), axis, bucket_bytes=256, first_bucket_bytes=64)
    return of_x(model, model)


@case("pypar.zero")
def _zero(axis):
    """The whole step: its backward is in the compiled function."""
    model, mesh = seeded(Mlp), Mesh(dp=dist.get_world_size())
    store = pypar.zero(model, mesh, blocks=[name for name, _ in model.named_children()][:1])

    def run(x):
        store.zero_grad()
        with store.accumulate():
            model(x.detach()).square().sum().backward()
        loss = model(x.detach() * 3).square().sum()
        loss.backward()
        return torch.stack([p.grad.square().sum() for p in store.parameters()]) + loss.detach()

    return run, lambda length: (numbers(2, length, WIDTH, seed=axis.rank).detach(),), None


@case("pypar.data_parallel.GradientBuckets")
def _gradient_buckets(axis):
    """The whole step: its backward is in the compiled function."""
    model = seeded(Mlp)
    buckets = pypar.GradientBuckets(model.parameters(), axis, bucket_bytes=256, first_bucket_bytes=64)

    def run(x):
        buckets.zero()
        with buckets.accumulate():
            model(x.detach()).square().sum().backward()
        loss = model(x.detach() * 3).square().sum()
        loss.backward()
        buckets.finish()
        buckets.scale(0.5)
        return torch.stack([buckets.gradient(p).square().sum() for p in model.parameters()]) + loss.detach()

    return run, lambda length: (numbers(2, length, WIDTH, seed=axis.rank).detach(),), None


@case("pypar.OnDisk")
def _on_disk(axis):
    """Without momentum, so that an update does not depend on those before it."""
    weight = nn.Parameter(torch.ones(2, WIDTH))
    optimizer = pypar.OnDisk(functools.partial(pypar.AdamW, lr=0.1, betas=(0.0, 0.0)), [weight], ROOT)

    def run(x):
        y = x.sum(1).detach() * 2
        with torch.no_grad():
            weight.fill_(1.0)
        weight.grad = y.sin()
        optimizer.step()
        return y + weight.detach() * 3

    return run, lambda length: (numbers(2, length, WIDTH),), None
