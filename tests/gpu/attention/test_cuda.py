"""csrc/attention/cuda/forward.cu, on the CPU by the host runtime of tests/harness/simt.

The long tests have every combination of sizes and types, the quick ones every pair.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from pypar.ops.attention import native as attention_native
from pypar.ops.attention import reference as attention_reference
from pypar.ops.attention.arguments import AttentionProblem, Positions, attention_problem
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import Judgement, expect, largest
from tests.harness.pairs import pairwise
from tests.harness.simt import build as simt_build
from tests.ops.attention import matrix
from tests.ops.attention.judge import DRAWS
from tests.ops.attention.matrix import AXES, Case, operands

pytestmark = pytest.mark.skipif(simt_build.why_not() is not None, reason=f"{simt_build.why_not()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = (64, 128, 256)  # of a kernel's tiles
# A GPU's head sizes; lengths with few rows, with several blocks of rows and of keys, and with split keys.
GPU_AXES = AXES | {
    "H": (64, 32, 40, 96, 128, 160, 256),
    "lengths": ((63, 111), (111, 63), (1, 700), (3, 520), (150, 97), (17, 1)),
}
CASES = matrix.sample(GPU_AXES)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def simt_forward(
    flavour: str, problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`attention.native.forward` by the kernels; they may touch nothing but the arguments and new tensors."""
    module = simt_build.simt_module("attention", flavour)
    with simt_build.buffers(
        module, **{name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}
    ):
        for result in carry or ():
            simt_build.register(module, result)
        return attention_native.forward(module, attention_native.with_aligned_rows(problem), carry)


def double(problem: AttentionProblem) -> AttentionProblem:
    floats = {
        name: x.double()
        for name, x in vars(problem).items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return replace(problem, **floats)


@torch.no_grad()
def judged(flavour: str, tensors: dict[str, Tensor], keywords: dict) -> tuple[list[Tensor], list[Judgement]]:
    """(out, lse) and how each keeps the error rule."""
    results = simt_forward(flavour, attention_problem(**tensors, **keywords))
    expected = expect(partial(plain_attention, **keywords), tensors)
    return list(results), [expected.judge(name, x) for name, x in zip(("out", "lse"), results, strict=True)]


def check(flavour: str, tensors: dict[str, Tensor], keywords: dict) -> list[Tensor]:
    """(out, lse), which keep the error rule."""
    results, judgements = judged(flavour, tensors, keywords)
    for judgement in judgements:
        judgement.check()
    return results


def check_in_draws(flavour: str, operands_of: Callable[[int], tuple[dict[str, Tensor], dict]]) -> None:
    """The rule for out and lse, as `tests.ops.attention.judge.run` has it; operands_of: those of the nth draw."""
    draws = [judged(flavour, *operands_of(0))[1]]
    if any(judgement.failure for judgement in draws[0]):
        draws += [judged(flavour, *operands_of(turn))[1] for turn in range(1, DRAWS)]
    for judgements in zip(*draws, strict=True):
        largest(judgements).check()


def make(
    T: int, S: int, H: int, dtype: torch.dtype, N: int = 4, G: int = 2, B: int = 1, turn: int = 0
) -> dict[str, Tensor]:
    shapes = {"q": (B, T, N, H), "k": (B, S, G, H), "v": (B, S, G, H)}
    return {
        name: draw(*shape, seed=i + 100 * turn, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_features(case: Case):
    check_in_draws("fast", partial(operands, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.sample(GPU_AXES, 300, seed=1), ids=str)
def test_every_pair_of_features(case: Case):
    check_in_draws("fast", partial(operands, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.sample(GPU_AXES, 60, seed=2), ids=str)
def test_every_pair_of_features_checked(case: Case):
    check_in_draws("checked", partial(operands, case))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", HEADS)
@pytest.mark.parametrize(
    "lengths", [(256, 512), (512, 256), (1023, 1024), (1, 2048), (1, 239), (799, 3)], ids=str
)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (100, 20)}], ids=str)
def test_longer(lengths, mask, H, dtype):
    check_in_draws("fast", lambda turn: (make(*lengths, H, dtype, turn=turn), mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", HEADS)
def test_every_instance_touches_only_what_is_its_own(H, dtype):
    """Bounds, alignment, races, memory never written and missing waits, in each kernel of a tile size."""
    options = {"window": (40, 5), "softcap": 5.0, "dropout_p": 0.17, "dropout_seed": 3}
    check("checked", make(70, 90, H, dtype), {"causal": True})
    check("checked", make(33, 70, H, dtype) | {"bias": draw(4, 33, 70, seed=5)}, options)
    check("checked", make(1, 600, H, dtype), {"causal": True})  # keys are split over blocks


@pytest.mark.parametrize("group", [3, 5, 7, 17])
def test_any_number_of_query_heads_shares_a_key_head(group):
    for T in (1, 2, 45):
        check("fast", make(T, 77, 64, torch.bfloat16, N=group * 2), {"causal": True})


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-25, 3.0])
@pytest.mark.parametrize("T", [1, 70])
def test_scale_may_be_anything(scale, T):
    """The plain kernel wants one that is positive and far from fp32's limits; others take the other kernel."""
    check("fast", make(T, 90, 64, torch.bfloat16), {"scale": scale})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 70])
def test_not_a_number_shows(T, dtype):
    tensors = make(T, 90, 64, dtype)
    tensors["k"][0, 3, 0, 5] = math.nan
    out, lse = simt_forward("fast", attention_problem(**tensors))
    assert out[:, :, :2].isnan().all() and lse[:, :2].isnan().all()
    assert out[:, :, 2:].isfinite().all() and lse[:, 2:].isfinite().all()


@pytest.mark.parametrize(("H", "T", "dtype"), pairwise(HEADS, (1, 33), DTYPES))
def test_carry_continues(H, T, dtype):
    """Blocks of keys one after the other give what all keys give at once; positions are interleaved."""
    tensors = make(T, 150, H, dtype)
    sinks = draw(4, seed=7)
    options = {"causal": True, "dropout_p": 0.17, "dropout_seed": 5}
    out = torch.full((1, T, 4, H), math.nan)
    lse = torch.full((1, 4, T), -math.inf)
    for first in (100, 0, 50):  # the sink with the last
        part = {name: x[:, first : first + 50] if name != "q" else x for name, x in tensors.items()}
        positions = Positions(q_start=(150 - T) * 2, k_start=first * 2, step=2)
        problem = attention_problem(
            **part, **options, positions=positions, sinks=sinks if first == 50 else None
        )
        if first == 100:
            out.zero_()
        result = simt_forward("fast", problem, (out, lse))
        assert result[0] is out and result[1] is lse
    positions = Positions(q_start=(150 - T) * 2, k_start=0, step=2)
    whole = attention_problem(**tensors, **options, positions=positions, sinks=sinks)
    exact_out, exact_lse, _ = attention_reference.forward(double(whole), None)
    # P is rounded to the inputs' type, nothing else is.
    allowed = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert (out - exact_out).abs().max() < allowed
    assert (lse - exact_lse).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 70])
def test_carry_stays_where_no_key_is_seen(T, dtype):
    out, lse = draw(1, T, 4, 64, seed=3), draw(1, 4, T, seed=4)
    before = out.clone(), lse.clone()
    positions = Positions(q_start=0, k_start=1000)
    problem = attention_problem(**make(T, 90, 64, dtype), causal=True, positions=positions)
    simt_forward("fast", problem, (out, lse))
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 70])
def test_rows_that_see_nothing(T, dtype):
    tensors = make(T, 90, 64, dtype)
    out, lse = simt_forward("fast", attention_problem(**tensors, bias=torch.full((1, 1, T, 90), -math.inf)))
    assert (out == 0).all() and (lse == -math.inf).all()
    sinks = draw(4, seed=9)
    hidden = attention_problem(**tensors, bias=torch.full((1, 1, T, 90), -math.inf), sinks=sinks)
    out, lse = simt_forward("fast", hidden)
    assert (out == 0).all() and torch.allclose(lse, sinks[None, :, None].expand(1, 4, T), atol=1e-6)


def test_no_key_no_query_no_sequence():
    out, lse = simt_forward("fast", attention_problem(**make(5, 0, 64, torch.bfloat16)))
    assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = simt_forward("fast", attention_problem(**make(0, 5, 64, torch.bfloat16)))
    assert out.shape == (1, 0, 4, 64)
    tensors = {name: x[0] for name, x in make(40, 30, 64, torch.bfloat16).items()}
    ends = torch.tensor([0, 0, 40, 40], dtype=torch.int32), torch.tensor([0, 30, 30, 30], dtype=torch.int32)
    out, lse = simt_forward("fast", attention_problem(**tensors, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1]))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_many_sequences_are_found():
    """More than the 32 that a warp looks at together, some empty."""
    lengths = [(i * 7) % 5 * 9 for i in range(75)]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tensors = {name: x[0] for name, x in make(int(ends[-1]), int(ends[-1]), 64, torch.bfloat16).items()}
    check("fast", tensors, {"causal": True, "cu_seqlens_q": ends, "cu_seqlens_k": ends})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1, 700), (70, 90)], ids=str)
def test_twice_the_same_bits(lengths, dtype):
    problem = attention_problem(**make(*lengths, 64, dtype), dropout_p=0.1, dropout_seed=1)
    first, second = (simt_forward("fast", problem) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernels_cannot_take_is_a_sentence():
    module = simt_build.simt_module("attention", "fast")
    tensors = make(5, 6, 64, torch.bfloat16)
    skewed = tensors | {"k": draw(1, 6, 2, 65, seed=1, dtype=torch.bfloat16)[..., 1:]}
    with pytest.raises(ValueError, match="k's rows must be contiguous and begin at multiples of 16 bytes"):
        attention_native.forward(module, attention_problem(**skewed), None)
    for H in (20, 264):
        with pytest.raises(ValueError, match=f"head size {H} is not a multiple of 8 up to 256"):
            attention_native.forward(module, attention_problem(**make(5, 6, H, torch.bfloat16)), None)
