"""What attention refuses, and that it says so; and how torch sees it: opcheck, compile, gradcheck."""

import math
import re

import pytest
import torch
from test_attention import NAMES, make

from pypar.ops.attention import _flat, attention, attention_backward, attention_forward
from pypar.ops.attention_arguments import attention_problem


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
    for chosen in ({"scale": 0.3}, options):
        problem = attention_problem(**inputs, **chosen)
        torch.library.opcheck(torch.ops.pypar.attention_forward.default, (*_flat(problem), name))
        constants = {n: getattr(x, "detach", lambda x=x: x)() for n, x in (inputs | chosen).items()}
        problem = attention_problem(**constants)
        out, lse = attention_forward(problem, backend=name)
        for dlse, bias_needs in ((torch.randn_like(lse), problem.bias is not None), (None, False)):
            arguments = (torch.randn_like(out), out, lse, dlse, bias_needs, *_flat(problem), name)
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


def test_only_lse_is_used():
    inputs = make(20, 30)
    attention(**inputs, return_lse=True, backend="native")[1].sum().backward()
    assert inputs["q"].grad.any() and inputs["k"].grad.any() and not inputs["v"].grad.any()


BAD = {
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
    "unknown backend 'nativ'": {"backend": "nativ"},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence):
    arguments = {**{name: x.detach() for name, x in make().items()}, **BAD[sentence]}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        attention(**arguments)


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
