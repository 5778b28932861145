"""What attention refuses, and that it says so; and how torch sees it: opcheck, compile, gradcheck."""

import math
import re

import pytest
import torch

from pypar.ops.attention import attention, attention_backward, attention_forward
from pypar.ops.attention.arguments import attention_problem
from pypar.ops.attention.operator import flat
from tests.ops.attention.test_attention import NAMES, make


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(3, 5), (5, 3)], ids=str)
def test_gradcheck_of_the_reference(causal, lengths):
    inputs = make(*lengths, N=4, G=2, H=3, Hv=2, dtype=torch.float64)
    seen = slice(max(0, lengths[0] - lengths[1]) if causal else 0, None)

    def function(q, k, v):
        out, lse = attention(q, k, v, causal=causal, scale=0.7, return_lse=True, backend="reference")
        return out, lse[:, :, seen]

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make(7, 9, N=4, H=16, Hv=24)
    options = {
        "causal": True,
        "scale": 0.3,
        "window": (4, None),
        "softcap": 5.0,
        "sinks": torch.randn(4).requires_grad_(),
        "alibi_slopes": torch.rand(4),
        "bias": torch.randn(1, 4, 1, 9).requires_grad_(),
        "dropout_p": 0.2,
        "dropout_seed": 3,
    }
    for chosen, with_dlse in (({"scale": 0.3}, False), (options, True)):
        problem = attention_problem(**inputs, **chosen)
        torch.library.opcheck(torch.ops.pypar.attention_forward.default, (*flat(problem), name))
        constants = {n: getattr(x, "detach", lambda x=x: x)() for n, x in (inputs | chosen).items()}
        problem = attention_problem(**constants)
        out, lse, lse_rest = torch.ops.pypar.attention_forward.default(*flat(problem), name)
        assert lse_rest.shape == (lse.shape if name == "native" else (0,))
        dlse = torch.randn_like(lse) if with_dlse else None
        bias_needs = problem.bias is not None
        arguments = (torch.randn_like(out), out, lse, lse_rest, dlse, bias_needs, *flat(problem), name)
        torch.library.opcheck(torch.ops.pypar.attention_backward.default, arguments)


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_whole(return_lse):
    def function(q, k, v):
        result = attention(q * 2, k, v, causal=True, return_lse=return_lse)
        return result[0].sum() + result[1].sum() if return_lse else result.sum()

    inputs = make(33, 44)
    torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs).backward()
    gradients = [x.grad.clone() for x in inputs.values()]
    for x in inputs.values():
        x.grad = None
    function(**inputs).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(gradients, inputs.values(), strict=True))


def test_compiles_whole_with_numbers_that_change():
    """torch.compile traces a float argument instead of taking its value."""

    def function(q, scale, softcap, dropout_p):
        return attention(q, q, q, scale=scale, softcap=softcap, dropout_p=dropout_p, dropout_seed=3)

    q = make(33, 33)["q"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for numbers in ((0.5, 2.0, 0.1), (0.7, 3.0, 0.2)):
        assert torch.equal(compiled(q, *numbers), function(q, *numbers))


def test_second_derivatives_are_refused():
    """They would be zeros."""
    q = make(5, 5)["q"]
    (dq,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiate once"):
        dq.sum().backward()


def test_only_lse_is_used():
    inputs = make(20, 30)
    attention(**inputs, return_lse=True, backend="native")[1].sum().backward()
    assert inputs["q"].grad.any() and inputs["k"].grad.any() and not inputs["v"].grad.any()


BAD = {
    "q is a list and must be a torch.Tensor": {"q": [0.0]},
    "q is torch.int64; it must be float32": {n: torch.zeros(1, 3, 2, 8, dtype=torch.int64) for n in "qkv"},
    "q is torch.complex64": {n: torch.zeros(1, 3, 2, 8, dtype=torch.complex64) for n in "qkv"},
    "q is torch.sparse_coo and must be dense": {"q": torch.zeros(1, 63, 2, 64).to_sparse()},
    "sinks is a list": {"sinks": [0.0, 0.0]},
    "scale ('wide') must be a number": {"scale": "wide"},
    "scale (1e+300) must be finite, at most 1e+30": {"scale": 1e300},
    "softcap (None) must be a number": {"softcap": None},
    "softcap (1e-60)": {"softcap": 1e-60},
    "dropout_p (0.9999999999) must be at least 0 and below 1": {"dropout_p": 1 - 1e-10},
    "window's right (True)": {"window": (0, True)},
    "window's left (1180591620717411303424)": {"window": (2**70, 0)},
    "dropout_seed is a float": {"dropout_p": 0.1, "dropout_seed": 1.5},
    "q (63, 2, 64) must be [batch": {"q": torch.zeros(63, 2, 64)},
    "k is torch.bfloat16 and q is torch.float32": {"k": torch.zeros(1, 111, 2, 64, dtype=torch.bfloat16)},
    "v is on meta": {"v": torch.zeros(1, 111, 2, 64, device="meta")},
    "k (2, 111, 2, 64) must have q's batch": {"k": torch.zeros(2, 111, 2, 64)},
    "k (1, 111, 2, 63) must have q's batch (1) and q's head size (64)": {"k": torch.zeros(1, 111, 2, 63)},
    "v (1, 110, 2, 64) must have one vector per key": {"v": torch.zeros(1, 110, 2, 64)},
    "v (1, 111, 2, 0) must": {"v": torch.zeros(1, 111, 2, 0)},
    "q's number of heads (3) must be a positive multiple of k's (2)": {"q": torch.zeros(1, 63, 3, 64)},
    "q's number of heads (0)": {"q": torch.zeros(1, 63, 0, 64)},
    "scale (inf) must be finite": {"scale": math.inf},
    "scale (nan) must be finite": {"scale": math.nan},
    "scale (-inf) must be finite": {"scale": -math.inf},
    "unknown backend 'nativ'": {"backend": "nativ"},
    "window's left (-2) must be a whole number of keys, at least 0; None (or -1)": {"window": (-2, 0)},
    "window's right (-7)": {"window": (None, -7)},
    "window's left (1.5)": {"window": (1.5, 0)},
    "window (3) must be a pair (left, right)": {"window": 3},
    "window ((1, 2, 3)) must be a pair": {"window": (1, 2, 3)},
    "softcap (-1.0) must be finite and not negative; 0 switches it off": {"softcap": -1.0},
    "softcap (nan)": {"softcap": math.nan},
    "softcap (inf)": {"softcap": math.inf},
    "dropout_p (1.0) must be at least 0 and below 1": {"dropout_p": 1.0},
    "dropout_p (-0.1)": {"dropout_p": -0.1},
    "dropout_p (nan)": {"dropout_p": math.nan},
    "dropout_seed (-1) must be at least 0": {"dropout_p": 0.1, "dropout_seed": -1},
    "dropout_seed (2,) torch.int64": {"dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
    "dropout_seed (1,) torch.int32": {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int32)},
    "sinks (3,) must have one number per query head: (2,)": {"sinks": torch.zeros(3)},
    "sinks torch.int64 on cpu must be floating point": {"sinks": torch.zeros(2, dtype=torch.int64)},
    "sinks torch.float32 on meta": {"sinks": torch.zeros(2, device="meta")},
    "alibi_slopes requires a gradient and gets none": {"alibi_slopes": torch.zeros(2, requires_grad=True)},
    "alibi_slopes (3,) must be (2,) or (1, 2)": {"alibi_slopes": torch.zeros(3)},
    "alibi_slopes (2, 2) must be": {"alibi_slopes": torch.zeros(2, 2)},
    "alibi_slopes torch.float32 on meta": {"alibi_slopes": torch.zeros(2, device="meta")},
    "bias (62, 111) must broadcast to [B, N, T, S] = (1, 2, 63, 111)": {"bias": torch.zeros(62, 111)},
    "bias (1, 1, 1, 1, 111) must broadcast": {"bias": torch.zeros(1, 1, 1, 1, 111)},
    "bias (2, 1, 63, 111) must broadcast": {"bias": torch.zeros(2, 1, 63, 111)},
    "bias is torch.float16; it must be q's torch.float32": {"bias": torch.zeros(111, dtype=torch.float16)},
    "bias torch.bool on cpu must be floating point": {"bias": torch.zeros(63, 111, dtype=torch.bool)},
    "bias torch.float32 on meta": {"bias": torch.zeros(63, 111, device="meta")},
}


def ends(*values, dtype=torch.int32, **options):
    return torch.tensor(values, dtype=dtype, **options)


# Of sequences with 63 queries and 111 keys in all.
BAD_LENGTHS = {
    "cu_seqlens_k is a list": {"cu_seqlens_k": [0, 0, 50, 111]},
    "cu_seqlens_k is missing": {"cu_seqlens_k": None},
    "cu_seqlens_q is missing": {"cu_seqlens_q": None},
    "cu_seqlens_q (4,) torch.int64 must be int32": {"cu_seqlens_q": ends(0, 9, 20, 63, dtype=torch.int64)},
    "cu_seqlens_k (2, 2) torch.int32": {"cu_seqlens_k": ends(0, 9, 20, 111).reshape(2, 2)},
    "cu_seqlens_k (0,) torch.int32": {"cu_seqlens_k": ends()},
    "cu_seqlens_q is on meta and q is on cpu": {"cu_seqlens_q": ends(0, 9, 20, 63, device="meta")},
    "cu_seqlens_q[2] (8) is below cu_seqlens_q[1] (9); it must not decrease": {
        "cu_seqlens_q": ends(0, 9, 8, 63)
    },
    "cu_seqlens_k[2] (5) is below": {"cu_seqlens_k": ends(0, 112, 5, 111)},
    "cu_seqlens_q goes from 0 to 64; it must start at 0 and end at q": {"cu_seqlens_q": ends(0, 9, 20, 64)},
    "cu_seqlens_q goes from 0 to 62": {"cu_seqlens_q": ends(0, 9, 20, 62)},
    "cu_seqlens_k goes from 1 to 111": {"cu_seqlens_k": ends(1, 9, 20, 111)},
    "cu_seqlens_q describes 2 sequences and cu_seqlens_k 3": {"cu_seqlens_q": ends(0, 9, 63)},
    "bias does not combine with cu_seqlens_q": {"bias": torch.zeros(63, 111)},
    "alibi_slopes (2, 3) must be (2,)": {"alibi_slopes": torch.zeros(2, 3)},
    "alibi_slopes (4, 2) must be (2,) or (3, 2)": {"alibi_slopes": torch.zeros(4, 2)},
    "q (1, 63, 2, 64) must be [positions of all sequences": {"q": torch.zeros(1, 63, 2, 64)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence):
    arguments = {**{name: x.detach() for name, x in make().items()}, **BAD[sentence]}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        attention(**arguments)


@pytest.mark.parametrize("sentence", BAD_LENGTHS)
def test_bad_sequences(sentence):
    arguments = {name: x.detach()[0] for name, x in make().items()}
    arguments |= {"cu_seqlens_q": ends(0, 9, 20, 63), "cu_seqlens_k": ends(0, 0, 50, 111)}
    attention(**arguments)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        attention(**{**arguments, **BAD_LENGTHS[sentence]})


def test_bad_results_for_the_raw_backward():
    q, k, v = (x.detach() for x in make().values())
    problem = attention_problem(q, k, v)
    out, lse = attention_forward(problem)
    with pytest.raises(ValueError, match=re.escape("dout (1, 63, 2, 63)")):
        attention_backward(problem, out[..., 1:], out, lse)
    with pytest.raises(ValueError, match=re.escape("lse (1, 63, 2)")):
        attention_backward(problem, out, out, lse.transpose(1, 2))
    with pytest.raises(ValueError, match=re.escape("dk (1, 111, 2, 64) torch.bfloat16")):
        attention_backward(problem, out, out, lse, into=(q, k.bfloat16(), v))


def test_float64_is_refused_by_native():
    with pytest.raises(ValueError, match="float64 is not one of float32, bfloat16, float16"):
        attention(**make(4, 4, dtype=torch.float64), backend="native")
