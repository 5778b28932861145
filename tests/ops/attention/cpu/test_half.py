"""bf16 and fp16 attention by the CPU's own products: blocks, masks, states that move, what is not finite."""

import math
from functools import partial

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import attention
from pypar.ops.attention import native as attention_native
from pypar.ops.attention.arguments import Positions, attention_problem
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import check_operator, expect
from tests.harness.native_kernels import assert_same_for_any_threads, instruction_set

DTYPES = {"amx_fp16": torch.float16, "amx": torch.bfloat16, "avx512_bf16": torch.bfloat16}
ISAS = [isa for isa in native.module().supported_isas() if isa in DTYPES]
pytestmark = [
    pytest.mark.skipif(not ISAS, reason="this CPU has no instructions for products in bf16 or fp16"),
    pytest.mark.parametrize("isa", ISAS),
]


def make(isa, T, S, N=2, G=2, H=64, Hv=None, B=1, scale=1.0):  # noqa: PLR0913
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (B, T, N, H), "k": (B, S, G, H), "v": (B, S, G, Hv or H)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["q"] *= scale
    return {name: x.to(DTYPES[isa]).requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize(
    "sizes", [(17, 1, 64, 64), (33, 64, 32, 96), (64, 65, 16, 200), (129, 257, 111, 59)], ids=str
)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
def test_sizes(isa, sizes, heads):
    T, S, H, Hv = sizes
    with instruction_set(isa):
        check_operator(
            lambda **x: attention(**x, return_lse=True),
            plain_attention,
            make(isa, T, S, *heads, H=H, Hv=Hv, B=2),
        )


@pytest.mark.parametrize("window", [(0, 0), (5, 40), (100, None), (None, 31), (130, 0)], ids=str)
def test_windows(isa, window):
    left, right = window
    with instruction_set(isa):
        check_operator(
            lambda **x: attention(**x, window=window, return_lse=True),
            lambda **x: plain_attention(**x, window=(left, right)),
            make(isa, 300, 340, N=4),
        )


def test_sinks(isa):
    with instruction_set(isa):
        inputs = make(isa, 70, 133) | {"sinks": torch.tensor([2.0, -1.0], requires_grad=True)}
        check_operator(
            lambda **x: attention(**x, causal=True, return_lse=True),
            lambda **x: plain_attention(**x, causal=True),
            inputs,
        )


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_of_several_lengths(isa, causal):
    T, S = [70, 0, 1, 33, 129], [40, 31, 0, 33, 300]
    inputs = {name: x.detach()[0].requires_grad_() for name, x in make(isa, sum(T), sum(S), N=4).items()}
    ends_q, ends_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (T, S))

    def ours(q, k, v):
        return attention(q, k, v, causal=causal, cu_seqlens_q=ends_q.int(), cu_seqlens_k=ends_k.int())

    def each(q, k, v):
        parts = [
            plain_attention(
                q[None, ends_q[i] : ends_q[i + 1]],
                *(x[None, ends_k[i] : ends_k[i + 1]] for x in (k, v)),
                causal=causal,
                return_lse=False,
            )[0]
            for i in range(len(T))
            if S[i]
        ]
        parts.insert(2, q.new_zeros(1, *q.shape[1:]))  # the third sequence has one query and no key
        return torch.cat(parts)

    with instruction_set(isa):
        check_operator(ours, each, inputs)


def test_scores_that_grow_along_the_keys(isa):
    """Each block of keys moves every row's reference, also by more than the fast path may leave."""
    inputs = {name: x.detach() for name, x in make(isa, 100, 1000).items()}
    inputs["q"] = inputs["q"].abs()
    inputs["k"] = (inputs["k"].abs() * torch.linspace(0, 12, 1000)[:, None, None]).to(DTYPES[isa])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with instruction_set(isa):
        check_operator(lambda **x: attention(**x, return_lse=True), plain_attention, leaves)


@pytest.mark.parametrize("scale", [30.0, -3.0])
def test_large_scores(isa, scale):
    with instruction_set(isa):
        check_operator(
            lambda **x: attention(**x, causal=True, return_lse=True),
            lambda **x: plain_attention(**x, causal=True),
            make(isa, 260, 300, scale=scale),
        )


def test_scores_near_zero(isa):
    """Plain attention's lse is then exact but for fp32's last place, and ours must be as near."""
    inputs = make(isa, 260, 300, scale=1e-4)
    with instruction_set(isa):
        check_operator(lambda **x: attention(**x), lambda **x: plain_attention(**x, return_lse=False), inputs)
        lse = attention(**inputs, return_lse=True)[1]
    exact = plain_attention(**{name: x.detach().double() for name, x in inputs.items()})[1]
    assert (lse - exact).abs().max() < 2e-6


@pytest.mark.parametrize("power", [-12, 14])
def test_gradients_of_any_size(isa, power):
    """dout times a power of two gives the gradients times that, to the bit: dS neither overflows nor underflows."""
    inputs = make(isa, 150, 301, N=4)
    problem = attention_problem(*(x.detach() for x in inputs.values()), causal=True)
    generator = torch.Generator().manual_seed(3)
    dout = torch.randint(-15, 16, (1, 150, 4, 64), generator=generator).to(DTYPES[isa]) / 4
    with instruction_set(isa):
        out, lse = attention_native.forward(native.module(), problem, None)
        results = []
        for factor in (1.0, 2.0**power):
            into = tuple(torch.zeros(x.shape) for x in inputs.values())
            attention_native.backward(native.module(), problem, dout * factor, out, lse, None, into, None)
            results.append([x / factor for x in into])
    for name, x, expected in zip("qkv", *reversed(results), strict=True):
        assert x.isfinite().all() and torch.equal(x, expected), f"d{name}"


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(isa, name, value):
    inputs = {key: x.detach() for key, x in make(isa, 70, 300).items()}
    inputs[name][0, 37 if name == "q" else 211, 1, 3] = value
    with instruction_set(isa):
        out = attention(**inputs)
    finite = attention(**inputs, backend="reference").isfinite()
    assert not finite.all() and torch.equal(out.isfinite(), finite)


@pytest.mark.parametrize("causal", [False, True])
def test_carried_over_blocks_of_keys(isa, causal):
    """Keys in two parts with fp32 results between them: as accurate as all at once."""
    inputs = make(isa, 150, 301, N=4)
    q, k, v = (x.detach() for x in inputs.values())
    whole = attention_problem(q, k, v, causal=causal)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[isa])
    out = torch.zeros(q.shape)
    lse = torch.full(whole.lse_shape, -math.inf)
    gradients = [torch.zeros(x.shape) for x in (q, k, v)]
    # With positions, a part of the keys is masked as in the whole.
    parts = [
        attention_problem(q, k[:, part], v[:, part], causal=causal, positions=positions)
        for part, positions in split_in_two(whole)
    ]
    with instruction_set(isa):
        for part in parts:
            attention_native.forward(native.module(), part, (out, lse))
        for part, keys in zip(parts, (slice(0, 170), slice(170, None)), strict=True):
            into = (gradients[0], gradients[1][:, keys], gradients[2][:, keys])
            attention_native.backward(native.module(), part, dout, out, lse, None, into, None)
    expected = expect(lambda **x: plain_attention(**x, causal=causal, return_lse=False), inputs, [dout])
    expected.check("out", out.to(DTYPES[isa]))
    for name, x in zip("qkv", gradients, strict=True):
        expected.check(f"d{name}", x.to(DTYPES[isa]))


def split_in_two(problem):
    start = problem.k.shape[1] - problem.q.shape[1]
    for keys in (slice(0, 170), slice(170, None)):
        yield keys, Positions(q_start=start, k_start=keys.start)


@pytest.mark.parametrize("window", [None, (None, 0), (350, 200)], ids=str)
def test_rows_in_several_chunks(isa, window):
    """The backward goes through 1,000 positions of 8 heads of 128 in several chunks; their gradients differ in size."""
    ramp = 2.0 ** torch.linspace(-8, 8, 1000).round()[:, None, None].to(DTYPES[isa])
    for factor in (ramp, ramp.flip(0)):
        with instruction_set(isa):
            check_operator(
                lambda **x: attention(**x, window=window) * factor,  # noqa: B023
                lambda **x: plain_attention(**x, window=window, return_lse=False) * factor,  # noqa: B023
                make(isa, 1000, 1050, N=8, G=1, H=128),
            )


def test_chunks_that_are_added(isa):
    """dq has the same bits added to zeros as alone; dk and dv differ by fp32 sums of chunks, then rounded."""
    q, k, v = (x.detach() for x in make(isa, 1000, 1050, N=8, G=1, H=128).values())
    problem = attention_problem(q, k, v, causal=True)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[isa])
    with instruction_set(isa):
        out, lse = attention_native.forward(native.module(), problem, None)
        backward = partial(attention_native.backward, native.module(), problem, dout, out, lse, None)
        alone = backward(None, None)
        added = backward((torch.zeros(q.shape), torch.full(k.shape, 3.0), torch.full(v.shape, -2.0)), None)
    assert torch.equal(added[0].to(q.dtype), alone[0])
    for name, x, start, expected in zip("kv", added[1:], (3.0, -2.0), alone[1:], strict=True):
        eps = torch.finfo(q.dtype).eps
        torch.testing.assert_close(x - start, expected.float(), rtol=eps, atol=1e-5, msg=f"d{name}")


@pytest.mark.parametrize("accumulate", [False, True])
def test_chunks_keep_to_their_memory(isa, monkeypatch, accumulate):
    """The memory of several chunks stands between guards, and what it holds before does not matter."""
    x = {name: x.detach()[0] for name, x in make(isa, 700, 300, N=8, H=128).items()}
    ends = [torch.tensor(ends, dtype=torch.int32) for ends in ((0, 30, 700), (0, 10, 300))]
    problem = attention_problem(**x, causal=True, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])
    buffers = []

    def guarded(num_bytes, like):
        buffers.append(torch.full((num_bytes + 8192,), 255, dtype=torch.uint8))  # NaN in any dtype
        return buffers[-1][4096 : 4096 + num_bytes]

    def backward():
        into = tuple(torch.zeros(x.shape) for x in (problem.q, problem.k, problem.v)) if accumulate else None
        return attention_native.backward(native.module(), problem, out, out, lse, None, into, None)

    with instruction_set(isa):
        out, lse = attention_native.forward(native.module(), problem, None)
        expected = backward()
        monkeypatch.setattr(attention_native, "_memory", guarded)
        assert all(map(torch.equal, backward(), expected))
    assert (buffers[0][:4096] == 255).all() and (buffers[0][-4096:] == 255).all()


def test_a_long_sequence_among_short_ones(isa):
    """Only the long ones have a second chunk; with some queries that see no key."""
    ends_q, ends_k = [0, 30, 930, 930, 1000, 1900], [0, 40, 700, 701, 800, 1700]
    lengths = [torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k)]
    inputs = {name: x.detach()[0].requires_grad_() for name, x in make(isa, 1900, 1700, N=8, G=1).items()}

    def ours(q, k, v):
        return attention(q, k, v, causal=True, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1])

    def each(q, k, v):
        spans = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
        parts = [
            plain_attention(q[None, a:b], k[None, c:d], v[None, c:d], causal=True, return_lse=False)[0]
            for a, b, c, d in spans
        ]
        return torch.cat(parts)

    with instruction_set(isa):
        check_operator(ours, each, inputs)


@pytest.mark.parametrize("length", [500, 2200])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 20)}], ids=str)
def test_same_for_any_threads(isa, options, length):
    with instruction_set(isa):
        assert_same_for_any_threads(
            lambda **x: attention(**x, return_lse=True, **options), make(isa, length, length, N=4, G=2)
        )
