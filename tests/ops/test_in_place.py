"""What layers and functions return may be written to, as what torch's own return: `y += x`, `relu_`, `out.add_`.

Attention's may not where a gradient is asked for, as F.scaled_dot_product_attention's: backward reads it.
"""

import pytest
import torch
import torch.distributed as dist

from pypar.comm import gather_from, gather_replicated, reduce_from, reduce_scatter_to, split_to
from pypar.context_parallel import shard, unshard
from pypar.mesh import Axis
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
    vocab_parallel_cross_entropy,
)

IDS = torch.arange(8).reshape(2, 4)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).requires_grad_()


def layers(axis, dtype):
    """Calls of each layer, of inputs of one to four dimensions."""
    features = 32 // axis.size
    for bias in (False, True):
        options = {"bias": bias, "dtype": dtype}
        column, gathered = (
            ColumnParallelLinear(32, 32, axis, gather_output=gather, **options) for gather in (False, True)
        )
        row = RowParallelLinear(32, 32, axis, **options)
        for shape in ((), (4,), (2, 4), (2, 3, 4)):
            name = f"{shape}, {'bias' if bias else 'no bias'}"
            x, part = normal(*shape, 32, dtype=dtype), normal(*shape, features, dtype=dtype)
            yield f"column {name}", lambda x=x, layer=column: layer(x)
            yield f"column, gathered {name}", lambda x=x, layer=gathered: layer(x)
            yield f"row {name}", lambda x=part, layer=row: layer(x)
            both = [column.weight, column.weight]
            yield f"two columns {name}", lambda x=x, both=both: column_parallel(x, both, axis)[1]
        sequence = ColumnParallelLinear(32, 32, axis, sequence_parallel=True, **options)
        x = normal(1, 4 // axis.size, 32, dtype=dtype)
        yield f"column, sequence {bias}", lambda x=x, layer=sequence: layer(x)
        sequence = RowParallelLinear(32, 32, axis, sequence_parallel=True, **options)
        x = normal(1, 4, features, dtype=dtype)
        yield f"row, sequence {bias}", lambda x=x, layer=sequence: layer(x)
    for sequence_parallel in (False, True):
        embedding = VocabParallelEmbedding(8, 32, axis, dtype=dtype, sequence_parallel=sequence_parallel)
        yield f"embedding {sequence_parallel}", lambda embedding=embedding: embedding(IDS)
    logits = normal(2, 4, features, dtype=dtype)
    yield "loss", lambda: vocab_parallel_cross_entropy(logits, IDS, axis)


def functions(axis, dtype):
    """Calls of the collectives that make something new; copy_to returns its input."""
    for dim in (0, 1, -1):
        x = normal(4, 4, 8, dtype=dtype)
        for function in (gather_from, gather_replicated, reduce_scatter_to, split_to):
            yield f"{function.__name__} {dim}", lambda x=x, dim=dim, f=function: f(x, axis, dim)
        yield f"unshard {dim}", lambda x=x, dim=dim: unshard(x, dim, axis, "contiguous")
        yield f"shard {dim}", lambda x=x, dim=dim: shard(x, dim, axis, "zigzag")
    x = normal(3, 4, dtype=dtype)
    yield "reduce_from", lambda: reduce_from(x, axis)


def run(dtype):
    axis = Axis.of(dist.group.WORLD, "tp")
    failures = []
    for make in (layers, functions):
        for name, call in make(axis, dtype):
            try:
                expected = call() * 2
                out = call()
                out.mul_(2)
                assert torch.equal(out, expected), "another value"
                out.sum().backward()
            except (RuntimeError, AssertionError, IndexError) as error:
                failures.append(f"{name}: {str(error)[:200]}")
    return failures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_over_two_ranks_may_be_written_to(ranks, dtype):
    for failures in ranks(2, run, dtype):
        assert not failures, "\n".join(failures)
