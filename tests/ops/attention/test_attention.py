"""attention on every backend.

The long tests have every combination of backend, mask, type and sizes, the quick ones every pair, as test_matrix.py has
of all options; and a thousand queries and keys.
"""

import math

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import BACKENDS, attention, attention_backward, attention_forward
from pypar.ops.attention.arguments import attention_problem
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import check_operator, expect
from tests.harness.native_kernels import assert_same_for_any_threads, instruction_set
from tests.harness.pairs import pairwise

ANY = torch.zeros(1, 1, 1, 8)
# The GPU's are tested in tests/gpu/attention.
NAMES = [
    backend.name for backend in BACKENDS if backend.unsupported(attention_problem(ANY, ANY, ANY)) is None
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, S): from FlashAttention's test matrix, and what divides nothing.
LENGTHS = [(63, 111), (113, 203), (203, 113), (256, 512)]
# (H, Hv)
HEAD_SIZES = [(32, 32), (40, 40), (59, 59), (64, 64), (96, 128), (111, 32), (128, 128), (256, 64)]
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}


def make(T=63, S=111, N=2, G=2, H=64, Hv=None, B=1, dtype=torch.float32):  # noqa: PLR0913
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (B, T, N, H), "k": (B, S, G, H), "v": (B, S, G, Hv or H)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def check(inputs, causal, **options):
    """Compares out, lse and their gradients; without lse where rows see no key, since their lse is -inf."""
    lse = not (causal and inputs["q"].shape[1] > inputs["k"].shape[1])
    check_operator(
        lambda q, k, v: attention(q, k, v, causal=causal, return_lse=lse, **options),
        lambda q, k, v: plain_attention(q, k, v, causal=causal, return_lse=lse),
        inputs,
    )


@pytest.mark.parametrize(
    ("name", "causal", "dtype", "lengths"), pairwise(NAMES, (False, True), DTYPES, LENGTHS)
)
def test_lengths(name, causal, dtype, lengths):
    check(make(*lengths, dtype=dtype), causal, backend=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_queries_and_keys(name, causal, dtype):
    check(make(1023, 1024, dtype=dtype), causal, backend=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 239), (3, 799)], ids=str)
def test_few_queries(name, causal, lengths):
    check(make(*lengths, N=4, G=2), causal, backend=name)


@pytest.mark.parametrize(
    ("name", "causal", "dtype", "sizes"), pairwise(NAMES, (False, True), DTYPES[:2], HEAD_SIZES)
)
def test_head_sizes(name, causal, dtype, sizes):
    H, Hv = sizes
    check(make(203, 215, H=H, Hv=Hv, dtype=dtype), causal, backend=name)


@pytest.mark.parametrize(
    ("name", "causal", "dtype", "kind"), pairwise(NAMES, (False, True), DTYPES[:2], HEADS)
)
def test_grouped_heads(name, causal, dtype, kind):
    N, G = HEADS[kind]
    check(make(203, 301, N=N, G=G, B=2, dtype=dtype), causal, backend=name)


@pytest.mark.parametrize(
    ("isa", "causal", "dtype", "sizes"),
    pairwise(native.module().supported_isas(), (False, True), DTYPES, [(59, 64), (64, 59)]),
)
def test_every_instruction_set(isa, causal, dtype, sizes):
    H, Hv = sizes
    with instruction_set(isa):
        check(make(203, 215, N=4, H=H, Hv=Hv, dtype=dtype), causal, backend="native")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_one_key(name, causal):
    """The output is the key's value, whatever the score; so the score's gradient is zero."""
    inputs = make(239, 1, H=59, Hv=256)
    out = attention(**inputs, causal=causal, backend=name)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(dout)
    first = 238 if causal else 0
    assert torch.equal(out[:, first:], inputs["v"].expand_as(out)[:, first:])
    torch.testing.assert_close(inputs["v"].grad[:, 0], dout[:, first:].sum(1), rtol=1e-5, atol=1e-5)
    for x in (inputs["q"], inputs["k"]):
        assert not x.grad.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"dropout_p": 0.5, "dropout_seed": 3}, {"bias": torch.ones(2, 1, 1)}],
    ids=str,
)
def test_one_query_and_one_key(name, dtype, options):
    """Nothing but v reaches the result: the other gradients are 0, not what rounding leaves of it."""
    inputs = make(1, 1, H=80, B=3, dtype=dtype)
    options = {n: x.clone().requires_grad_() if n == "bias" else x for n, x in options.items()}
    out = attention(**inputs, **options, backend=name)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype))
    assert inputs["v"].grad.any()
    for x in (inputs["q"], inputs["k"], options.get("bias", inputs["q"])):
        assert not x.grad.any()
    lse = attention(**inputs, return_lse=True, backend=name)[1]
    (dq,) = torch.autograd.grad(lse.sum(), inputs["q"])
    torch.testing.assert_close(dq, inputs["k"].detach() * 80**-0.5, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_key_that_is_not_a_number_shows(name):
    inputs = make(1, 1, H=16)
    with torch.no_grad():
        inputs["v"][..., 3] = math.nan
    attention(**inputs, backend=name).sum().backward()
    assert inputs["q"].grad.isnan().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_strides(name, dtype):
    """Heads before positions, head size in the middle, every second element, one batch repeated."""
    inputs = {name: x.detach() for name, x in make(63, 111, N=4, B=2, H=48, dtype=dtype).items()}
    inputs["v"] = inputs["v"][:1].expand(2, -1, -1, -1)
    views = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
        lambda x: x[:1].expand_as(x) if torch.equal(x[0], x[1]) else x.flip(1).flip(1),
    ]
    dout = torch.randn(2, 63, 4, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    problem = attention_problem(**inputs, causal=True)
    out, lse = attention_forward(problem, backend=name)
    expected = attention_backward(problem, dout, out, lse, backend=name)
    for view in views:
        turned = {name: view(x) for name, x in inputs.items()}
        assert all(torch.equal(turned[name], x) for name, x in inputs.items())
        problem = attention_problem(**turned, causal=True)
        again, lse = attention_forward(problem, backend=name)
        gradients = attention_backward(problem, view(dout), view(out), lse, backend=name)
        for a, b in zip((again, *gradients), (out, *expected), strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b) if name == "native" else torch.allclose(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_see_no_key(name):
    inputs = make(97, 34, N=2, G=1, H=40)
    out, lse = attention(**inputs, causal=True, return_lse=True, backend=name)
    (out.sum() + lse[:, :, 63:].sum()).backward()
    assert not out[:, :63].any() and (lse[:, :, :63] == -math.inf).all()
    assert out[:, 63:].all() and lse[:, :, 63:].isfinite().all()
    assert not inputs["q"].grad[:, :63].any() and inputs["q"].grad[:, 64:].any()
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_do(name, lengths, batch):
    inputs = make(*lengths, B=batch)
    out, lse = attention(**inputs, return_lse=True, backend=name)
    out.sum().backward()
    assert out.shape == inputs["q"].shape and not out.any() and (lse == -math.inf).all()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize(("name", "causal", "dtype"), pairwise(NAMES, (False, True), DTYPES[:2]))
def test_shares_of_two_blocks_of_keys_make_the_whole(name, causal, dtype):
    """What ring attention does backward: the final out and lse, one block of keys at a time, fp32 shares."""
    T, S, half = 130, 203, 101
    inputs = {name: x.detach() for name, x in make(T, S, N=4, dtype=dtype).items()}
    q, k, v = inputs.values()
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    dlse = torch.randn(1, 4, T, generator=torch.Generator().manual_seed(4))
    whole = attention_problem(q, k, v, causal=causal)
    out, lse = attention_forward(whole, backend=name)
    expected = [torch.zeros(x.shape) for x in (q, k, v)]
    attention_backward(whole, dout, out, lse, dlse, tuple(expected), backend=name)
    # With the causal mask the last queries see all of the first keys, the first ones none of the last keys.
    pieces = [(slice(0, half), slice(0, T), False), (slice(half, S), slice(0, T), causal)]
    if causal:
        first_full = half - 1 - (S - T)
        pieces[0] = (slice(0, half), slice(first_full, T), False)
        pieces.append((slice(0, half), slice(0, first_full), True))
    sums = [torch.zeros(x.shape) for x in (q, k, v)]
    for keys, rows, masked in pieces:
        # A causal piece ends with the query that sees its last key.
        seen = slice(keys.start, rows.stop + S - T) if masked else keys
        part = attention_problem(q[:, rows], k[:, seen], v[:, seen], causal=masked)
        into = tuple(total[:, where] for total, where in zip(sums, (rows, seen, seen), strict=True))
        final = out[:, rows], lse[:, :, rows], dlse[:, :, rows]
        attention_backward(part, dout[:, rows], *final, into, backend=name)
    for total, exact in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_rounded_once(name):
    """bf16 gradients are the fp32 ones, rounded."""
    q, k, v = (x.detach() for x in make(203, 301, N=4, G=1, dtype=torch.bfloat16).values())
    problem = attention_problem(q, k, v, causal=True)
    out, lse = attention_forward(problem, backend=name)
    wide = tuple(torch.zeros(x.shape) for x in (q, k, v))
    arguments = problem, torch.randn_like(out), out, lse, None
    attention_backward(*arguments, wide, backend=name)
    for narrow, x in zip(attention_backward(*arguments, backend=name), wide, strict=True):
        assert torch.equal(narrow, x.to(torch.bfloat16))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [{"N": 1, "G": 1}, {"N": 4, "G": 2, "B": 2}], ids=str)
def test_same_for_any_number_of_threads(causal, shape):
    inputs = make(401, 503, **shape)
    assert_same_for_any_threads(
        lambda q, k, v: attention(q, k, v, causal=causal, return_lse=True, backend="native"), inputs
    )


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7, 1e-30])
def test_scale(scale):
    inputs = make(40, 50, H=16)
    out, lse = attention(**inputs, scale=scale, return_lse=True, backend="native")
    (out.sum() + lse.sum()).backward()
    gradients = [x.grad for x in inputs.values()]
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact, exact_lse = attention(**wide, scale=scale, return_lse=True, backend="reference")
    (exact.sum() + exact_lse.sum()).backward()
    exacts = [exact, exact_lse, *(x.grad for x in wide.values())]
    for a, b in zip([out, lse, *gradients], exacts, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_large_scores(name):
    """Scores in the thousands that grow from key to key: every block of keys rescales what came before."""
    inputs = make(30, 400, H=8)
    with torch.no_grad():
        inputs["k"] *= torch.linspace(0, 3000, 400).reshape(1, -1, 1, 1)
    out, lse = attention(**inputs, return_lse=True, backend=name)
    expected = expect(plain_attention, inputs)
    expected.check("out", out.detach())
    expected.check("lse", lse.detach())


def test_infinite_and_missing_values_stay_where_they_belong():
    inputs = {name: x.detach() for name, x in make(8, 200, N=1, G=1, H=16).items()}
    inputs["q"][0, 3] = math.nan
    out, lse = attention(**inputs, causal=True, return_lse=True, backend="native")
    assert out[0, 3].isnan().all() and lse[0, 0, 3].isnan()
    assert out[0, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()
