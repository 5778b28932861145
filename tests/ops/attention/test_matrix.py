"""Attention against the error rule: FlashAttention's matrix and what it lacks, on every backend of this machine.

`make test` runs a sample of short lengths in which every value and every pair of features occurs, on every backend, and
half of one in which several blocks hold the lengths, with every head size. The long tests add its other half and the
lengths: one sample with all of them, up to 2048, and 4356 cases, every head size with every length, mask and dtype, the
other features by turns.
"""

import functools
import itertools
from contextlib import nullcontext

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import BACKENDS
from pypar.ops.attention.arguments import attention_problem
from tests.harness.native_kernels import instruction_set
from tests.ops.attention.judge import compare, run
from tests.ops.attention.matrix import AXES, DTYPES, MIDDLE_LENGTHS, SHORT_LENGTHS, operands, sample, whole

MIDDLE_AXES = {**AXES, "lengths": tuple(MIDDLE_LENGTHS)}
SHORT_AXES = {**AXES, "lengths": tuple(SHORT_LENGTHS), "H": (64, 40, 59)}
LONG, MIDDLE, SHORT = sample(), sample(MIDDLE_AXES), sample(SHORT_AXES, seed=1)
BOTH_LARGE = [case for case in LONG if min(case.lengths) > 1000]
BY_NAME = {backend.name: backend for backend in BACKENDS}

# What a case is compared with takes the time: it is calculated once for all backends and instruction sets, which stand
# one behind the other.
LOWER = [f"native {isa}" for isa in native.module().supported_isas()[1:]]
SAMPLED = [("native", case) for case in MIDDLE[::2]]
SAMPLED += [(name, case) for case in SHORT for name in (*BY_NAME, *LOWER)]
SAMPLED += [pytest.param("native", case, marks=pytest.mark.slow) for case in MIDDLE[1::2]]
# One of thousands of queries and keys for each dtype.
LARGE = [
    min((case for case in BOTH_LARGE if case.dtype == dtype), key=lambda case: (case.lengths, case.H))
    for dtype in DTYPES
]


# What falls short of the rule over four draws, by at most 1.6 times the allowed; found on 2026-11-30 with AVX2.
SHORTFALLS = {
    # dq = p (dp - delta) k is a difference of two sums of 64 terms near 10, each rounded to fp32
    ("native", "239x1-H64-mha-fp32-local-cap50-bias-keys-dropout-sinks"),
    # p = exp(x - lse) loses half a unit of lse's last place, and ALiBi makes lse as large as a distance
    ("reference", "512x256-H32-gqa-fp32-full-cap3-alibi-heads-bias-keys-Hv64"),
    ("reference", "512x256-H32-gqa-fp32-left-alibi-batch-bias-keys-dropout"),
}


@functools.cache
def device_of(name: str) -> str | None:
    """Where a backend runs on this machine, or None."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        q = torch.zeros(1, 8, 1, 64, device=device)
        if BY_NAME[name].unsupported(attention_problem(q, q, q)) is None:
            return device
    return None


def refusal(name, case):
    """Why a backend does not run a case on this machine, or None."""
    device = device_of(name)
    if device is None:
        return f"{name} runs on no device of this machine"
    if name == "native":
        return None
    tensors, keywords = operands(case)
    there = {
        n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in {**tensors, **keywords}.items()
    }
    reason = BY_NAME[name].unsupported(attention_problem(**there))
    return reason and f"{name} refuses: {reason}"


def check(name, case):
    if reason := refusal(name, case):
        pytest.skip(reason)
    run(name, case, device_of(name))


@pytest.mark.parametrize(("name", "case"), SAMPLED, ids=str)
def test_sample(name, case):
    """name: of a backend, and of an instruction set where it is not the one that is taken."""
    backend, *isa = name.split()
    with instruction_set(isa[0]) if isa else nullcontext():
        check(backend, case)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_lengths(case):
    check("native", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=str)
def test_sample_of_every_length(case):
    check("native", case)


@pytest.mark.slow
@pytest.mark.parametrize("mask", AXES["mask"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", AXES["H"])
def test_whole_matrix(H, dtype, mask):
    """Every backend by turns, so that what a case is compared with is calculated once."""
    failures = {}
    cases = [case for case in whole() if (case.H, case.dtype, case.mask) == (H, dtype, mask)]
    for case, name in itertools.product(cases, BY_NAME):
        if refusal(name, case) is None:
            try:
                run(name, case, device_of(name))
            except AssertionError as error:
                failures[name, str(case)] = f"{name}, {case}: {error}"
    assert not failures.keys() - SHORTFALLS, "\n".join(failures.values())
    if failures:
        pytest.xfail("\n".join(failures.values()))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "lengths", [(1, 239), (128, 217), pytest.param((217, 128), marks=pytest.mark.slow)], ids=str
)
def test_sinks_of_many_heads(name, dtype, lengths):
    """Enough numbers for the largest error of dsinks to be no matter of luck."""
    if device_of(name) is None:
        pytest.skip(f"{name} runs on no device of this machine")
    generator = torch.Generator().manual_seed(11)
    (T, S), N, H = lengths, 64, 32
    shapes = {"q": (1, T, N, H), "k": (1, S, 2, H), "v": (1, S, 2, H), "sinks": (N,)}
    tensors = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
    tensors = {
        n: x.to(torch.float32 if n == "sinks" else DTYPES[dtype]).requires_grad_() for n, x in tensors.items()
    }
    compare(name, tensors, {"causal": True}, device=device_of(name), sinks_by_the_rule=True)


def test_the_sample_holds_every_value_and_every_pair_of_features():
    for axis in ("H", "lengths", "dtype", "mask"):
        assert {getattr(case, axis) for case in MIDDLE[::2]} == set(MIDDLE_AXES[axis])
    for cases, axes in (
        (LONG, AXES),
        (MIDDLE, MIDDLE_AXES),
        (SHORT, SHORT_AXES),
    ):
        for axis, values in axes.items():
            assert {getattr(case, axis) for case in cases} == set(values)
        for a, b in itertools.combinations([axis for axis in axes if axis not in ("lengths", "H")], 2):
            found = {(getattr(case, a), getattr(case, b)) for case in cases}
            missing = set(itertools.product(axes[a], axes[b])) - found
            assert all(
                {a, b} == {"bias", "varlen"} and True in pair and "none" not in pair for pair in missing
            )
    assert sum(1 for _ in whole()) == 4356
