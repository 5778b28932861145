"""Random combinations of everything that attention takes, small, drawn by hypothesis."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from pypar.ops.attention import attention
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import outputs_and_gradients
from tests.ops.attention.judge import check_sinks
from tests.ops.attention.test_matrix import BY_NAME, device_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
BOUND = some.one_of(some.none(), some.just(-1), some.integers(0, 40), some.just(2**40))


@some.composite
def lengths(draw):
    """(T, S, cumulative lengths or nothing)"""
    if draw(some.booleans()):
        return draw(some.integers(0, 130)), draw(some.integers(0, 130)), {}
    pairs = draw(some.lists(some.tuples(some.integers(0, 70), some.integers(0, 70)), min_size=1, max_size=4))
    ends = torch.tensor([(0, 0), *pairs]).cumsum(0).to(torch.int32)
    T, S = ends[-1].tolist()
    return T, S, {"cu_seqlens_q": ends[:, 0].contiguous(), "cu_seqlens_k": ends[:, 1].contiguous()}


@some.composite
def problems(draw):
    """(tensors, keywords) of one attention."""
    T, S, keywords = draw(lengths())
    G, group = draw(some.integers(1, 3)), draw(some.integers(1, 3))
    N, H, Hv = G * group, draw(some.integers(1, 72)), draw(some.integers(1, 72))
    dtype = draw(some.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 2**20)))

    def normal(*shape):
        # Any order of the dimensions in memory, and a gap between rows.
        order = draw(some.permutations(range(len(shape))))
        stored = torch.randn([shape[i] for i in order[:-1]] + [shape[order[-1]] + 1], generator=generator)[
            ..., :-1
        ]
        return stored.bfloat16().float().permute([order.index(i) for i in range(len(shape))])

    varlen = bool(keywords)
    B = len(keywords["cu_seqlens_q"]) - 1 if varlen else draw(some.integers(1, 3))
    lead = () if varlen else (B,)
    tensors = {"q": normal(*lead, T, N, H), "k": normal(*lead, S, G, H), "v": normal(*lead, S, G, Hv)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    keywords |= {
        "causal": draw(some.booleans()),
        "window": draw(some.one_of(some.none(), some.tuples(BOUND, BOUND))),
    }
    keywords["scale"] = draw(some.one_of(some.none(), some.floats(-1, 1)))
    keywords["softcap"] = draw(some.sampled_from([0.0, 0.0, 1.5, 30.0]))
    if draw(some.booleans()):
        tensors["sinks"] = normal(N).contiguous()
    if draw(some.booleans()):
        keywords["alibi_slopes"] = normal(*draw(some.sampled_from([(N,), (B, N)]))).abs() / 4
    if draw(some.booleans()):
        keywords["dropout_p"] = draw(some.sampled_from([0.1, 0.5]))
        keywords["dropout_seed"] = draw(some.integers(0, 2**63 - 1))
    if not varlen and draw(some.booleans()):
        shape = [size if draw(some.booleans()) else 1 for size in (B, N, T, S)][draw(some.integers(0, 3)) :]
        bias = normal(*shape).to(draw(some.sampled_from([dtype, torch.float32])))
        hide = draw(some.sampled_from([0, 0, 2, 7]))
        tensors["bias"] = bias.masked_fill(torch.rand(shape, generator=generator) * hide > 1, -math.inf)
    return {name: x.requires_grad_() for name, x in tensors.items()}, keywords


def assert_near(name, dtype, actual, plain, exact, scale=1.0):
    """4 times plain attention's error, and 4 units (fp32: 16) of the last place of the largest number.

    This looks for wrong numbers, not for lost digits: with sizes so small plain attention's error is small by luck.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape, name
    infinite = exact.isinf()
    assert torch.equal(actual.isinf(), infinite), name
    actual, plain, exact = (x.masked_fill(infinite, 0).double() for x in (actual, plain, exact))
    if exact.numel():
        units = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        allowed = 4 * (plain - exact).abs().max() + units * max(scale, exact.abs().max())
        assert (actual - exact).abs().max() <= allowed, name


def check(name, problem):
    tensors, keywords = problem
    dtype = tensors["q"].dtype
    plain = functools.partial(plain_attention, **keywords)
    ours = functools.partial(attention, **keywords, return_lse=True, backend=name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        outputs = plain(**tensors)
    douts = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    results = [
        outputs_and_gradients(function, tensors, douts, double)
        for function, double in ((ours, False), (plain, False), (plain, True))
    ]
    for what, *three in zip(("out", "lse"), *(x[0] for x in results), strict=True):
        assert_near(what, dtype if what == "out" else torch.float32, *three)
    if "sinks" in tensors:
        check_sinks(results[0][1]["sinks"], tensors["sinks"], *douts, *results[0][0])
    # For the out that was returned: judge._differences says why.
    lost = (douts[0].double() * (results[2][0][0] - results[0][0][0])).sum(-1).mT
    exact = outputs_and_gradients(plain, tensors, [douts[0], douts[1] + lost], double=True)[1]
    for what in set(tensors) - {"sinks"}:
        # A bias that many scores share has the sum of their gradients, which cancel.
        num_scores = outputs[1].numel() * tensors["k"].shape[-3] if what == "bias" else 1
        scale = max(1.0, num_scores / max(1, tensors[what].numel())) ** 0.5
        assert_near(f"d{what}", dtype, *(x[1][what] for x in results[:2]), exact[what], scale)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=60, derandomize=True, **QUIET)
@given(problem=problems())
def test_random_problems(name, problem):
    if device_of(name) != "cpu":
        pytest.skip(f"{name} does not run on the CPU")
    check(name, problem)


@pytest.mark.slow
@settings(max_examples=3000, print_blob=True, **QUIET)
@given(problem=problems())
def test_many_random_problems(problem):
    check("native", problem)
