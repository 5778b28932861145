"""all-reduce's Triton kernels in Triton's interpreter: ranks are processes, flags are exchanged for real. bfloat16 runs
in test_ptx_triton.py: the interpreter computes with it as with integers. The long test has two ranks for three."""

import sys
from collections.abc import Iterator

import pytest
import torch

if sys.platform != "linux":
    pytest.skip(
        "Triton has wheels for Linux only", allow_module_level=True
    )  # elsewhere a missing one is an error

from pypar.comm.allreduce.peers import residual_norm_reference
from pypar.kernels.allreduce_launches import describe
from tests.gpu.allreduce.definition import drawn, total
from tests.gpu.allreduce.interpreted_ranks import Call, InterpretedRanks


@pytest.fixture(scope="module")
def interpreted() -> Iterator[InterpretedRanks]:
    ranks = InterpretedRanks()
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("ranks", "dtype"), [(3, torch.float32), pytest.param(2, torch.float16, marks=pytest.mark.slow)]
)
def test_every_rank_gets_the_sum_in_rank_order(interpreted, ranks, dtype):
    """Calls of different sizes and kinds, one after another with pauses: slots and flags of one are not another's."""
    kinds = ("one-shot", "two-shot", "two-shot", "one-shot", "one-shot", "two-shot")
    sizes = (1, 5000, 2049, 63, 9000, 7)
    inputs = [drawn(ranks, (n,), dtype, seed) for seed, n in enumerate(sizes)]
    calls = [Call(kind, [(x,) for x in parts]) for kind, parts in zip(kinds, inputs, strict=True)]
    for results, error in interpreted.run(ranks, calls):
        assert error == 0
        for (y,), parts in zip(results, inputs, strict=True):
            assert torch.equal(y, total(parts).to(dtype))


def test_residual_norm(interpreted):
    ranks, calls, expected = 3, [], []
    for seed, (rows, D) in enumerate([(5, 100), (40, 64), (1, 1)]):
        parts = drawn(ranks, (rows, D), torch.float16, seed)
        residual, weight = drawn(2, (rows, D), torch.float16, seed + 10)
        calls.append(Call("residual norm", [(x, residual, weight[0].float()) for x in parts]))
        expected.append(residual_norm_reference(parts, residual, weight[0].float(), 1e-5))
    by_rank = interpreted.run(ranks, calls)
    for i, (out, kept) in enumerate(expected):
        for results, error in by_rank:
            assert error == 0
            torch.testing.assert_close(
                results[i][0], out, rtol=2**-10, atol=0
            )  # another order of the mean's sum
            assert torch.equal(results[i][1], kept)
            assert torch.equal(results[i][0], by_rank[0][0][i][0])


def test_a_rank_that_does_not_come_is_named(interpreted):
    there = [(x,) for x in drawn(3, (10,), torch.float32)]
    calls = [Call("one-shot", there), Call("two-shot", [there[0], None, there[2]])]
    results = interpreted.run(3, calls, limit=1500)
    assert [describe(error) for _, error in results] == [(1, 2, "the data"), None, (1, 2, "the data")]
