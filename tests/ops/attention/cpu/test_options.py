"""attention's CPU kernels: every option, alone and together, against autograd through the plain formula in fp64.

The long tests have each of some options in each type on each instruction set, the quick ones every pair; and masks of
lengths that are nearly the same.
"""

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import native as attention_native
from tests.harness.native_kernels import instruction_set
from tests.harness.pairs import pairwise
from tests.ops.attention.cpu.judge import (
    DTYPES,
    OPTIONS,
    check,
    make,
    make_douts,
    run_native,
    varlen,
)

ISAS = native.module().supported_isas()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        # fp32 has code of its own; the types of 16 bits differ in how they are read and written, and take turns
        pytest.param(dtype, name, marks=pytest.mark.slow if turn == 1 + i % 2 else ())
        for turn, dtype in enumerate(DTYPES)
        for i, name in enumerate(OPTIONS)
    ],
    ids=str,
)
def test_options(dtype, name):
    check(make(dtype=dtype, **OPTIONS[name]))


@pytest.mark.parametrize(
    ("name", "dtype", "isa"),
    pairwise(("window", "softcap", "everything", "dropout", "bias by columns"), DTYPES, ISAS),
)
def test_options_on_every_instruction_set(name, dtype, isa):
    with instruction_set(isa):
        check(make(dtype=dtype, H=48, Hv=35, **OPTIONS[name]))


@pytest.mark.parametrize(
    "lengths",
    [(251, 113), (97, 1), (64, 600), pytest.param((300, 280), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize(
    "name", ["causal", "window", "left window", "own position", "positions", "striped", "sinks"]
)
def test_masks_of_other_lengths(name, lengths):
    check(make(*lengths, B=1, **OPTIONS[name]))


# ---- repeatability

REPEATED = {
    "causal": lambda: make(300, 300, causal=True),
    "window": lambda: make(300, 700, window=(100, 0)),
    "everything": lambda: make(**OPTIONS["everything"]),
    "sequences": lambda: varlen("mixed", causal=True),
    "decoding": lambda: make(2, 2000, dtype=torch.bfloat16),
    "few blocks": lambda: make(90, 2500, N=1, G=1, B=1),
}


@pytest.mark.parametrize("name", REPEATED)
def test_bitwise_for_any_number_of_threads(name):
    problem = REPEATED[name]()
    douts = make_douts(problem)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(num_threads)
            results.append(run_native(problem, douts))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, other[result]) for result, x in results[0].items())


@pytest.mark.parametrize("name", ["causal", "everything", "dropout"])
def test_dropout_and_masks_are_the_same_on_every_instruction_set(name):
    """Zeros of p are exact: with v = 1 a row's output counts what was kept."""
    kept = []
    for isa in ISAS:
        with instruction_set(isa):
            problem = make(70, 130, **{**OPTIONS[name], "bias": None})
            dbias = torch.zeros(problem.scores_shape)
            out, lse = attention_native.forward(native.module(), problem, None)
            dout, dlse = torch.ones_like(out), torch.zeros_like(lse)
            attention_native.backward(native.module(), problem, dout, out, lse, dlse, None, dbias)
            kept.append(dbias == 0)
    assert all(torch.equal(kept[0], other) for other in kept[1:])
