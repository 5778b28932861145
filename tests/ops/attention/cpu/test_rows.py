"""The bits of a row of attention depend on that row and its keys, not on the rows beside it in the call."""

from dataclasses import replace

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import BY_NAME
from pypar.ops.attention.arguments import Positions, attention_problem
from tests.harness.native_kernels import instruction_set

ISAS = native.module().supported_isas()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = {
    "amx_fp16": "fp16",
    "amx": "bf16",
    "avx512_bf16": "bf16",
}  # with products of their own; the others as fp32
KERNELS = [(isa, dtype) for isa in ISAS for dtype in ("fp32", HALF.get(isa, "")) if dtype]
KERNELS += [(ISAS[-1], "bf16"), (ISAS[-1], "fp16")]
T, S = 450, 1650
# Some begin within a block of rows, some end so; some are so few that tasks share their keys, the whole is not.
PARTS = [slice(37, 64), slice(101, 450), slice(291, 450), slice(333, 334 + 96)]
MASKS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (130, 0)},
    "window of both sides": {"window": (45, 100)},
    "full": {},
    "scores grow": {"causal": True},
    "softcap": {"causal": True, "softcap": 3.0},
    "sinks, alibi, dropout": {"causal": True, "dropout_p": 0.2, "dropout_seed": 3},
}


def operands(mask, dtype, N, G, H=24):
    generator = torch.Generator().manual_seed(7)
    q, dout = (torch.randn(1, T, N, H, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, S, G, H, generator=generator) for _ in range(2))
    options = dict(MASKS[mask])
    if mask == "scores grow":  # so that the references move, of each row at its own keys
        k = k.abs() * torch.linspace(0, 8, S)[:, None, None]
        q = q.abs() * torch.rand(1, T, N, 1, generator=generator)
    if mask == "sinks, alibi, dropout":
        options["sinks"] = torch.randn(N, generator=generator)
        options["alibi_slopes"] = torch.rand(N, generator=generator)
    return [x.to(dtype) for x in (q, k, v, dout)], options


def assert_same(actual, expected, isa, what):
    """Bit by bit; dq of fp16 products within one unit in the last place.

    What the gradients of these scores are multiplied by, a power of two, follows from all rows of a head: it decides
    which of the smallest lose bits.
    """
    for name, theirs in expected.items():
        ours = actual[name]
        if name == "dq" and isa == "amx_fp16" and ours.dtype == torch.float16:
            unit = torch.clamp(theirs.abs().float() * 2**-10, min=2**-24)
            assert ((ours.float() - theirs.float()).abs() <= 2 * unit).all(), (name, *what)
            assert (ours != theirs).float().mean() < 1e-3, (name, *what)
        else:
            assert torch.equal(ours, theirs), (name, *what)


def results(problem, dout):
    backend = BY_NAME["native"]
    out, lse, *rest = backend.forward(problem, None)
    dq, _, _ = backend.backward(problem, dout, out, lse, None, None, None, *rest)
    return {"out": out, "lse": lse.mT, "dq": dq}  # rows are dimension 1


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
@pytest.mark.parametrize("mask", MASKS)
def test_of_a_slice_of_the_queries(isa, dtype, mask):
    for heads in ((1, 1), (2, 1)):
        (q, k, v, dout), options = operands(mask, DTYPES[dtype], *heads)
        whole = attention_problem(q, k, v, positions=Positions(q_start=S - T), **options)
        with instruction_set(isa):
            expected = results(whole, dout)
            for part in PARTS:
                there = replace(whole, q=q[:, part], positions=Positions(q_start=S - T + part.start))
                actual = results(there, dout[:, part])
                assert_same(actual, {n: x[:, part] for n, x in expected.items()}, isa, (part, heads))


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
def test_of_every_seventh_query(isa, dtype):
    """In another order, too."""
    (q, k, v, dout), _ = operands("full", DTYPES[dtype], 2, 1)
    rows = torch.arange(0, T, 7).flip(0)
    with instruction_set(isa):
        expected = results(attention_problem(q, k, v), dout)
        actual = results(attention_problem(q[:, rows], k, v), dout[:, rows])
    assert_same(actual, {name: x[:, rows] for name, x in expected.items()}, isa, ())


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_of_one_document_of_several(isa, dtype, causal):
    (q, k, v, dout), _ = operands("full", DTYPES[dtype], 2, 1)
    ends_q, ends_k = [0, 41, 61, 300, T], [0, 55, 155, 500, S]
    documents = {
        name: torch.tensor(ends, dtype=torch.int32)
        for name, ends in (("cu_seqlens_q", ends_q), ("cu_seqlens_k", ends_k))
    }
    with instruction_set(isa):
        expected = results(attention_problem(q[0], k[0], v[0], causal=causal, **documents), dout[0])
        for i in range(len(ends_q) - 1):
            rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
            alone = attention_problem(q[:, rows], k[:, keys], v[:, keys], causal=causal)
            actual = {name: x[0] for name, x in results(alone, dout[:, rows]).items()}
            assert_same(actual, {name: x[rows] for name, x in expected.items()}, isa, (i,))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("H", [16, 24, 64])
def test_a_window_that_begins_behind_a_block_of_keys(isa, H):
    """Zeros for keys that a row of the block does not see were written behind the scores, over values."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, length, 1, H, generator=generator) for length in (T, S, S))
    problem = attention_problem(q, k, v, causal=True, window=(130, 0))
    exact, *_ = BY_NAME["reference"].forward(problem, None)
    with instruction_set(isa):
        out, *_ = BY_NAME["native"].forward(problem, None)
    assert (out - exact).abs().max() < 1e-5
