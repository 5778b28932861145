"""Every shipped CUDA kernel as nvcc compiles it, run by ptxrun, which also looks for races and missing waits.

The long tests have every combination of head size, type and options, the quick ones every pair of these.
"""

import os
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor

from pypar.ops.attention.arguments import attention_problem
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import OUTPUTS, expect, judge_draws
from tests.harness import ptx_attention
from tests.harness.pairs import pairwise

FOLDER = os.environ.get("PYPAR_PTXRUN", "")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]
HEADS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def make(T: int, S: int, H: int, dtype: torch.dtype, turn: int = 0) -> dict[str, Tensor]:
    shapes = {"q": (1, T, 2, H), "k": (1, S, 1, H), "v": (1, S, 1, H)}
    return {
        name: draw(*shape, seed=10 * turn + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())
    }


def check(draws: list[dict[str, Tensor]], keywords: dict, num_splits: int = 1, **options) -> None:
    """out and lse of the compiled kernel keep the error rule, over all draws of the tensors together.

    One row gives two numbers of lse, whose error in one draw is luck.
    """
    results, expected = [], []
    for tensors in draws:
        problem = attention_problem(**tensors, **keywords)
        made = ptx_attention.run_forward(FOLDER, problem, num_splits=num_splits, **options)
        results.append(dict(zip(OUTPUTS, made, strict=True)))
        expected.append(expect(partial(plain_attention, **keywords), tensors))
    judge_draws(results, expected).check()


OPTIONS = {"plain": {}, "any": {"softcap": 5.0, "dropout_p": 0.17, "dropout_seed": 3}}


@pytest.mark.parametrize(("name", "H", "dtype"), pairwise(OPTIONS, HEADS, DTYPES))
def test_forward(name, H, dtype):
    """Two blocks of rows and of keys, neither whole."""
    T = 33 if dtype == torch.float32 or H == 256 else 65
    check([make(T, 70, H, dtype)], {"causal": True, **OPTIONS[name]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", HEADS)
def test_forward_with_split_keys(H, dtype):
    check([make(1, 200, H, dtype) | {"sinks": draw(2, seed=4)}], {"window": (150, 0)}, num_splits=2)


@pytest.mark.parametrize("schedule", [{"schedule": "warp", "seed": 1}, {"cp_async": "early"}], ids=str)
@pytest.mark.parametrize("T", [1, 65])
def test_forward_in_other_orders(T, schedule):
    """One warp at a time as far as it gets, in random order; asynchronous copies that arrive at once."""
    check([make(T, 200, 64, torch.bfloat16)], {"causal": True}, **schedule)


def test_forward_of_several_sequences():
    tensors = {name: x[0] for name, x in make(90, 100, 64, torch.bfloat16).items()}
    ends = {"cu_seqlens_q": [0, 5, 5, 90, 90], "cu_seqlens_k": [0, 20, 50, 50, 100]}
    check(
        [tensors], {name: torch.tensor(x, dtype=torch.int32) for name, x in ends.items()} | {"causal": True}
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [32, 40, 64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (50, 7)}], ids=str)
@pytest.mark.parametrize("T", [1, 150])
def test_forward_of_every_head_size(T, mask, H, dtype):
    modified = {
        "softcap": 5.0,
        "dropout_p": 0.17,
        "dropout_seed": 3,
        "alibi_slopes": torch.tensor([0.1, 0.3]),
    }
    draws = [make(T, 203, H, dtype, turn) for turn in range(4 if T == 1 else 1)]
    for options in ({}, modified):
        check(draws, {**mask, **options})
    bias = {"bias": draw(2, T, 203, seed=5, dtype=dtype)}
    check([tensors | bias for tensors in draws], mask)


def test_sizes_here_are_the_kernels_own():
    """ptx_attention repeats what csrc says of tiles."""
    cuda = pytest.importorskip("pypar._cuda")
    known = {part: numbers for part, *numbers in cuda.attention_forward_kernels()}
    for dtype in DTYPES:
        for H in HEADS:
            for T, options in ((1, {}), (100, {}), (100, {"softcap": 1.0})):
                shape = ptx_attention.forward_shape(attention_problem(**make(T, 9, H, dtype), **options))
                (numbers,) = (numbers for part, numbers in known.items() if shape.mark in part)
                assert numbers == [shape.threads, shape.shared_bytes]
