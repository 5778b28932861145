"""Native attention gives the same bits in every run, by one thread and by two; 12 quick runs, 100 long ones."""

import math

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import BACKENDS
from pypar.ops.attention.arguments import Positions, attention_problem

NATIVE = next(backend for backend in BACKENDS if backend.name == "native")
ENDS = {
    "cu_seqlens_q": torch.tensor([0, 90, 90, 131, 150], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 77, 140, 140, 210], dtype=torch.int32),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# kind: (batch, T, S, keywords); sizes with several blocks of queries and of keys, and a remainder.
KINDS = {
    "full": (1, 150, 210, {}),
    "causal": (2, 201, 203, {"causal": True}),
    "window": (1, 303, 303, {"window": (40, 3)}),
    "all scores": (
        1,
        120,
        130,
        {"softcap": 5.0, "causal": True, "alibi_slopes": draw(4).abs(), "sinks": draw(4)},
    ),
    "bias": (2, 99, 130, {"bias": draw(1, 4, 1, 130)}),
    "dropout": (1, 150, 210, {"dropout_p": 0.3, "dropout_seed": 5}),
    "sequences": (None, 150, 210, {**ENDS, "causal": True}),
    "sequences, dropout": (
        None,
        150,
        210,
        {**ENDS, "dropout_p": 0.2, "dropout_seed": 5, "window": (30, None)},
    ),
    "decoding": (1, 1, 4000, {"causal": True}),
    "few queries": (2, 3, 1500, {"softcap": 8.0, "sinks": draw(4)}),
    "carry": (1, 150, 210, {"positions": Positions(q_start=60, k_start=10), "causal": True}),
    "decoding, carry": (1, 1, 3000, {"positions": Positions(q_start=3000)}),
}


def results(problem, dout, dlse, carried):
    """Every result: of forward, or of carrying on and adding to gradients."""
    before, into = None, None
    if carried:
        shape = problem.lse_shape
        before = (
            draw(*problem.out_shape, seed=8),
            draw(*shape, seed=9).masked_fill(draw(*shape) > 1, -math.inf),
        )
        into = tuple(draw(*x.shape, seed=7) for x in (problem.q, problem.k, problem.v))
    out, lse, *rest = NATIVE.forward(problem, before)
    dbias = None if problem.bias is None else torch.zeros(problem.scores_shape)
    gradients = NATIVE.backward(problem, dout, out.to(dout.dtype), lse, dlse, into, dbias, *rest)
    return [out, lse, *gradients] + ([] if dbias is None else [dbias])


@pytest.mark.parametrize("runs", [12, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_by_one_and_two_threads_are_equal(kind, dtype, runs):
    batch, T, S, keywords = KINDS[kind]
    lead = () if batch is None else (batch,)
    shapes = (*lead, T, 4, 32), (*lead, S, 2, 32), (*lead, S, 2, 48)
    problem = attention_problem(*(draw(*x, seed=i).to(dtype) for i, x in enumerate(shapes)), **keywords)
    dout, dlse = draw(*problem.out_shape, seed=3).to(dtype), draw(*problem.lse_shape, seed=4)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(problem, dout, dlse, "carry" in kind)
        assert all(x.isfinite().all() for i, x in enumerate(first) if i != 1)
        for run in range(runs):
            torch.set_num_threads(1 + run % 2)
            assert native.num_threads() == 1 + run % 2
            again = results(problem, dout, dlse, "carry" in kind)
            for i, (a, b) in enumerate(zip(first, again, strict=True)):
                assert torch.equal(a, b), f"result {i} of run {run}"
    finally:
        torch.set_num_threads(num_threads)
