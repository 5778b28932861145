"""attention's CPU kernels: sequences of several lengths, few queries, keys in parts; judged as each option is.

The long tests have every combination of lengths, types and options, the quick ones every pair; where a row of
sequences is one, has hardly any or no keys, the quick ones take the options that treat those apart.
"""

import itertools
import math

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import native as attention_native
from pypar.ops.attention.arguments import AttentionProblem, Positions
from pypar.selftest.judge import judge_result
from pypar.selftest.orders import in_orders
from tests.harness.native_kernels import instruction_set
from tests.harness.pairs import pairwise
from tests.ops.attention.cpu.judge import (
    DTYPES,
    OPTIONS,
    SEQUENCES,
    check,
    hiding_bias,
    make,
    make_douts,
    random,
    run_native,
    run_plain,
    varlen,
)

ISAS = native.module().supported_isas()

# ---- several sequences


QUICK = {"one": ("causal",), "empty ones": ("causal", "window"), "no keys": ("plain", "sinks")}


@pytest.mark.parametrize(
    ("name", "sequences"),
    [
        pytest.param(name, sequences, marks=() if name in QUICK.get(sequences, (name,)) else pytest.mark.slow)
        for name in ("plain", "causal", "window", "softcap", "sinks", "alibi", "dropout", "positions")
        for sequences in SEQUENCES
    ],
)
def test_sequences(name, sequences):
    # In fp32 dq's error is 1.4 and 1.1 times what these two are allowed.
    high = sequences == "decoding" and name in ("window", "alibi")
    check(varlen(sequences, dtype=torch.bfloat16 if high else torch.float32, **OPTIONS[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_of_every_dtype(dtype):
    check(varlen("mixed", dtype=dtype, causal=True))


def test_rows_behind_the_last_sequence_are_zero():
    problem = make(20, 30, cu_seqlens_q=torch.tensor([0, 20], dtype=torch.int32),
                   cu_seqlens_k=torch.tensor([0, 30], dtype=torch.int32))  # fmt: skip
    shorter = AttentionProblem(
        **{
            **problem.__dict__,
            "cu_seqlens_q": torch.tensor([0, 15], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 25], dtype=torch.int32),
        }
    )
    results = run_native(shorter, make_douts(problem))
    assert not results["out"][15:].any() and (results["lse"][:, 15:] == -math.inf).all()
    assert not any(results[name][begin:].any() for name, begin in (("dq", 15), ("dk", 25), ("dv", 25)))
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


# ---- few queries


@pytest.mark.parametrize(
    ("T", "dtype", "name"),
    pairwise((1, 3, 4), DTYPES, ("plain", "causal", "sinks", "softcap", "dropout", "left window")),
)
def test_decoding(T, dtype, name):
    check(make(T, 1500, H=72, Hv=136, dtype=dtype, **OPTIONS[name]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (8, 1)], ids=str)
def test_decoding_on_every_instruction_set(isa, heads):
    N, G = heads
    with instruction_set(isa):
        check(make(2, 700, N=N, G=G, bias=hiding_bias(2, N, 2, 700), causal=True))


@pytest.mark.parametrize(
    "name", ["window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("causal", "softcap"))]
)
def test_few_blocks_of_rows_split_their_keys(name):
    check(make(80, 3000, N=2, G=1, B=1, **OPTIONS[name]))


# ---- running results


@pytest.mark.parametrize(
    ("T", "name", "dtype"),
    pairwise((2, 150), ("plain", "causal", "window", "dropout", "softcap", "alibi"), DTYPES[:2]),
)
def test_carries_make_the_whole(T, name, dtype):
    """Three blocks of keys one after the other, as a ring's steps, give what all keys at once give."""
    S, ends = 700, [0, 230, 231, 700]
    whole = make(T, S, dtype=dtype, **{**OPTIONS[name], "positions": Positions(q_start=S - T)})
    module, douts = native.module(), make_douts(whole)
    carry = torch.zeros(whole.out_shape), torch.full(whole.lse_shape, -math.inf)
    blocks = []
    for begin, end in itertools.pairwise(ends):
        fields = {**whole.__dict__, "k": whole.k[:, begin:end], "v": whole.v[:, begin:end]}
        blocks.append(AttentionProblem(**{**fields, "positions": Positions(q_start=S - T, k_start=begin)}))
        assert attention_native.forward(module, blocks[-1], carry)[0] is carry[0]
    out = carry[0].to(dtype)
    totals = [torch.zeros(x.shape) for x in (whole.q, whole.k, whole.v)]
    for block, (begin, end) in zip(blocks, itertools.pairwise(ends), strict=True):
        into = totals[0], totals[1][:, begin:end], totals[2][:, begin:end]
        attention_native.backward(module, block, douts[0], out, carry[1], douts[1], into, None)
    exact = run_plain(whole, douts, torch.float64)
    fewest = min(x.numel() for x in exact.values())
    plains = in_orders(lambda: run_plain(whole, douts, dtype), dtype, fewest)
    actual = {"out": out, "lse": carry[1]} | dict(zip(("dq", "dk", "dv"), totals, strict=True))
    for result, x in actual.items():
        x = x.to(plains[0][result].dtype)
        found = [plain[result] for plain in plains]
        judge_result(result, x, found, exact[result], gradient=result.startswith("d")).check()


def test_a_sink_beside_a_carry():
    first, second = make(60, 90, sinks=random(4)), make(60, 90)
    out, lse = attention_native.forward(native.module(), first, None)
    carry = torch.zeros(out.shape), torch.full(lse.shape, -math.inf)
    attention_native.forward(native.module(), second, carry)
    empty = AttentionProblem(**{**first.__dict__, "k": first.k[:, :0], "v": first.v[:, :0]})
    attention_native.forward(native.module(), empty, carry)
    torch.testing.assert_close(carry[0], out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(carry[1], lse, rtol=1e-6, atol=1e-6)
