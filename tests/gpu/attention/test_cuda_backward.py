"""csrc/attention/cuda/backward.cu on the CPU, by the host runtime of tests/harness/simt, behind the forward kernels.

The long tests have every combination of sizes, types and masks, the quick ones every pair.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from pypar.ops.attention import native as attention_native
from pypar.ops.attention import reference as attention_reference
from pypar.ops.attention.arguments import AttentionProblem, Positions, attention_problem
from pypar.ops.backend import Backend
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import expect, judge_result
from tests.harness.pairs import pairwise
from tests.harness.simt import build as simt_build
from tests.ops.attention import matrix
from tests.ops.attention.judge import compare, run
from tests.ops.attention.matrix import AXES, operands

pytestmark = pytest.mark.skipif(simt_build.why_not() is not None, reason=f"{simt_build.why_not()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # (T, S, N, G, H, Hv)
    "D64": (63, 111, 4, 2, 64, 64),
    "H40": (111, 63, 2, 1, 40, 24),
    "D128": (63, 111, 4, 2, 128, 128),
    "H96": (111, 63, 2, 2, 96, 120),
    "D256": (63, 111, 2, 1, 256, 256),
    "H160": (63, 63, 2, 1, 160, 64),
}
# A GPU's head sizes; what a block of one shape streams and what several blocks do both occur.
GPU_AXES = AXES | {
    "H": (64, 40, 96, 128, 256),
    "lengths": ((63, 111), (111, 63), (9, 70), (130, 97), (17, 1)),
    "values": ("same", "other"),
}
GPU_CASES = matrix.sample(GPU_AXES)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def simt_backward(flavour: str, problem: AttentionProblem, dout: Tensor, *rest) -> tuple[Tensor, ...]:
    """`attention.native.backward` by the kernels; they may touch nothing but the arguments and new tensors."""
    module = simt_build.simt_module("attention", flavour)
    out, lse, dlse, into, dbias = rest
    inputs = {name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}
    with simt_build.buffers(module, **inputs, dout=dout, out=out, lse=lse, dlse=dlse):
        for result in (*(into or ()), *(() if dbias is None else (dbias,))):
            simt_build.register(module, result)
        aligned = attention_native.with_aligned_rows(problem)
        rows = attention_native.aligned(dout), attention_native.aligned(out)
        return attention_native.backward(module, aligned, *rows, lse, dlse, into, dbias)


def simt_forward(flavour: str, problem: AttentionProblem, carry: None) -> tuple[Tensor, Tensor]:
    module = simt_build.simt_module("attention", flavour)
    with simt_build.buffers(
        module, **{name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}
    ):
        return attention_native.forward(module, attention_native.with_aligned_rows(problem), carry)


def backend(flavour: str) -> Backend:
    return Backend("simt", partial(simt_forward, flavour), partial(simt_backward, flavour), lambda **_: None)


def make(
    T: int, S: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, B: int = 1
) -> dict:
    (N, G), (H, Hv) = heads, sizes
    shapes = {"q": (B, T, N, H), "k": (B, S, G, H), "v": (B, S, G, Hv)}
    return {
        name: draw(*shape, seed=i, dtype=dtype).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


def given(tensors: dict[str, Tensor], **keywords) -> tuple:
    """(problem, dout, out, lse) with the reference's forward."""
    problem = attention_problem(**{name: x.detach() for name, x in tensors.items()}, **keywords)
    out, lse, _ = attention_reference.forward(problem, None)
    return problem, draw(*out.shape, seed=9, dtype=out.dtype), out, lse


@pytest.mark.parametrize(("shape", "dtype", "causal"), pairwise(SHAPES, DTYPES, (False, True)))
def test_every_instance(shape, dtype, causal):
    T, S, N, G, H, Hv = SHAPES[shape]
    compare(backend("fast"), make(T, S, (N, G), (H, Hv), dtype), {"causal": causal})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [64, 128, 256])
def test_every_instance_touches_only_what_is_its_own(H, dtype):
    """Bounds, alignment, races, memory never written and missing waits, with every option at once."""
    tensors = make(33, 70, (2, 1), (H, H), dtype)
    tensors["bias"] = draw(2, 33, 70, seed=5, dtype=dtype).requires_grad_()
    options = {"window": (40, 5), "softcap": 5.0, "dropout_p": 0.17, "dropout_seed": 3}
    compare(backend("checked"), tensors, {**options, "alibi_slopes": torch.tensor([0.1, 0.2])})
    compare(backend("checked"), make(70, 33, (2, 1), (H, H), dtype), {"causal": True})


@pytest.mark.parametrize("case", GPU_CASES[::3], ids=str)
def test_features(case):
    run(backend("fast"), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*GPU_CASES, *matrix.sample(GPU_AXES, 300, seed=1)], ids=str)
def test_every_pair_of_features(case):
    run(backend("fast"), case)


# What falls short of the rule over four draws, by 1.2 times the allowed; found on 2026-12-01. p = exp2(a x - a lse), a
# the base 2 logarithm of e, loses half a unit of the last place of both products, which one row of one draw brings out.
SHORTFALLS = {"63x111-H40-mha-fp32-causal-cap3-alibi-batch-bias-keys-dropout-Hv24-sinks"}


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.sample(GPU_AXES, 100, seed=2), ids=str)
def test_every_pair_of_features_checked(case):
    try:
        run(backend("checked"), case)
    except AssertionError as error:
        if str(case) not in SHORTFALLS:
            raise
        pytest.xfail(f"{case}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(256, 512), (512, 256), (1023, 1024), (1, 239), (799, 3)], ids=str)
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (100, 20)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long(lengths, H, mask, dtype):
    compare(backend("fast"), make(*lengths, (2, 1), (H, H), dtype), mask)


@pytest.mark.parametrize(("dtype", "H", "step"), pairwise(DTYPES, (64, 256), (1, 3)))
def test_positions(step, H, dtype):
    """Queries and keys of a rank: they stand apart, and are counted from elsewhere by dropout."""
    at = Positions(q_start=50, k_start=-7, step=step, batch_start=2, head_start=5)
    options = {
        "window": (60, 9),
        "dropout_p": 0.3,
        "dropout_seed": 11,
        "alibi_slopes": torch.tensor([0.05, 0.02]),
    }
    compare(backend("fast"), make(70, 90, (2, 1), (H, H), dtype), {**options, "positions": at})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_without_queries_or_keys(dtype):
    lengths_q, lengths_k = [0, 40, 7, 0, 66, 1, 0], [5, 0, 70, 0, 66, 40, 0]
    tensors = make(sum(lengths_q), sum(lengths_k), (4, 2), (64, 64), dtype)
    tensors = {name: x.detach()[0].requires_grad_() for name, x in tensors.items()}
    ends = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k)]
    compare(backend("checked"), tensors, {"causal": True, "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing_give_zeros(dtype):
    problem, dout, out, lse = given(make(150, 20, (2, 1), (64, 64), dtype), causal=True)
    assert (lse[..., :130] == -torch.inf).all()
    dlse = draw(*lse.shape, seed=4)
    dq, dk, dv = simt_backward("fast", problem, dout, out, lse, dlse, None, None)
    assert not dq[:, :130].any() and dq[:, 131:].any()
    rows = dataclasses.replace(problem, q=problem.q[:, 130:].contiguous())
    parts = (x[:, 130:].contiguous() for x in (dout, out))
    values = (x[..., 130:].contiguous() for x in (lse, dlse))
    shorter = simt_backward("fast", rows, *parts, *values, None, None)
    for a, b in zip((dq[:, 130:], dk, dv), shorter, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(0, 40), (40, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("B", [0, 1])
def test_nothing_to_do(sizes, B):
    problem, dout, out, lse = given(make(*sizes, (2, 1), (64, 64), torch.bfloat16, B))
    for x in simt_backward("checked", problem, dout, out, lse, None, None, None):
        assert not x.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [64, 128, 256])
def test_parts_of_the_keys_add_up(H, dtype):
    """A ring's steps: out and lse are the whole attention's, dq is added to, dk and dv are of one part each."""
    tensors = make(63, 100, (2, 1), (H, H), dtype)
    problem, dout, out, lse = given(tensors, positions=Positions(q_start=37), causal=True)
    exact = attention_reference.backward(problem, dout, out, lse, None, None, None)
    dq = draw(*problem.q.shape, seed=8)
    start, dk, dv = dq.clone(), [], []
    for first, last in ((0, 61), (61, 100)):
        k, v = (x[:, first:last].contiguous() for x in (problem.k, problem.v))
        part = dataclasses.replace(problem, k=k, v=v, positions=Positions(q_start=37, k_start=first))
        into = (dq, torch.zeros(k.shape), torch.zeros(v.shape))
        assert simt_backward("fast", part, dout, out, lse, None, into, None)[0] is dq
        dk.append(into[1])
        dv.append(into[2])
    for actual, expected in zip((dq - start, torch.cat(dk, 1), torch.cat(dv, 1)), exact, strict=True):
        rounding = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert (actual - expected).abs().max() <= rounding * expected.abs().max()


def test_results_are_rounded_once():
    """Sums over the heads of a group and over blocks of queries stay in fp32."""
    tensors = make(200, 20, (8, 1), (64, 64), torch.bfloat16)
    problem, dout, out, lse = given(tensors)
    rounded = simt_backward("fast", problem, dout, out, lse, None, None, None)
    into = tuple(torch.zeros(x.shape) for x in (problem.q, problem.k, problem.v))
    for a, b in zip(rounded, simt_backward("fast", problem, dout, out, lse, None, into, None), strict=True):
        assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_result_in_whatever_order_threads_and_blocks_run(dtype):
    module = simt_build.simt_module("attention", "fast")
    arguments = given(make(80, 150, (2, 1), (64, 64), dtype), causal=True)
    try:
        results = []
        for order in ("linear", "reverse", "random"):
            module.set_options(block_order=order, thread_order=order, seed=5)
            results.append(simt_backward("fast", *arguments, None, None, None))
    finally:
        module.set_options()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides():
    """Heads before positions, a part of a wider row: read and written in place."""
    tensors = {
        name: draw(1, heads, length, 128, seed=i).transpose(1, 2)[..., 32:96].bfloat16().requires_grad_()
        for i, (name, heads, length) in enumerate((("q", 4, 63), ("k", 2, 111), ("v", 2, 111)))
    }
    wide = {
        name: torch.randn(1, x.shape[2], x.shape[1], 128)
        .bfloat16()
        .transpose(1, 2)[..., 32:96]
        .copy_(x.detach())
        for name, x in tensors.items()
    }
    compare(backend("checked"), {name: x.requires_grad_() for name, x in wide.items()}, {"causal": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 8, 2, 12), "k": (1, 8, 2, 12)}, "head size 12 is not a multiple of 8"),
        ({"v": (1, 8, 2, 264)}, "head size 264"),
    ],
    ids=str,
)
def test_refusals(change, message):
    shapes = {"q": (1, 8, 2, 64), "k": (1, 8, 2, 64), "v": (1, 8, 2, 64)} | change
    problem, *arguments = given({name: draw(*shape, seed=1) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=message):
        simt_backward("fast", problem, *arguments, None, None, None)


def test_refuses_rows_that_are_not_aligned():
    problem, dout, out, lse = given(make(8, 8, (2, 2), (64, 64), torch.bfloat16))
    module = simt_build.simt_module("attention", "fast")
    q = draw(1, 8, 2, 68, seed=1, dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ValueError, match="q needs element stride 1 and rows aligned to 16 bytes"):
        attention_native.backward(module, dataclasses.replace(problem, q=q), dout, out, lse, None, None, None)


def test_bias_gradient_is_accurate_for_every_element():
    """dbias as the kernel stores it, before it is summed to the bias's shape."""
    tensors = make(63, 111, (2, 1), (64, 64), torch.bfloat16) | {
        "bias": draw(2, 63, 111, seed=3).requires_grad_()
    }
    problem, dout, out, lse = given(tensors, window=(30, 30))
    results = [torch.zeros(problem.scores_shape) for _ in range(2)]
    simt_backward("fast", problem, dout, out, lse, None, None, results[0])
    attention_reference.backward(problem, dout, out, lse, None, None, results[1])
    plain = expect(lambda **x: plain_attention(**x, window=(30, 30))[0], tensors, [dout])
    plains = [found["dbias"] for found in plain.plains]
    judge_result("dbias", results[0][0], plains, results[1][0].double(), gradient=True).check()


def test_operands_are_what_the_cases_say():
    """The sample holds what this file relies on."""
    cases = GPU_CASES[::3]
    assert {case.H for case in cases} == {64, 40, 96, 128, 256}
    assert {case.dtype for case in cases} == {"fp32", "bf16", "fp16"}
    assert any(case.varlen for case in cases) and any("bias" in operands(case)[0] for case in cases)
