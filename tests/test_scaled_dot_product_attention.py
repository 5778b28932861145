"""The drop-in for torch's function gives what torch's gives."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_operator

import pypar

CASES = {
    "plain": ((2, 3, 7, 16), (2, 3, 9, 16), {}),
    "causal, square": ((2, 3, 33, 16), (2, 3, 33, 16), {"is_causal": True}),
    "causal, more keys": ((1, 2, 5, 8), (1, 2, 9, 8), {"is_causal": True}),
    "causal, more queries": ((1, 2, 9, 8), (1, 2, 5, 8), {"is_causal": True}),
    "scale": ((1, 2, 9, 8), (1, 2, 5, 8), {"scale": 0.3}),
    "gqa": ((2, 6, 9, 8), (2, 2, 5, 8), {"enable_gqa": True}),
    "2-d": ((9, 8), (5, 8), {}),
    "3-d": ((4, 9, 8), (4, 5, 8), {"is_causal": True}),
    "5-d": ((2, 3, 4, 9, 8), (2, 3, 4, 5, 8), {}),
    "one batch of keys": ((2, 4, 9, 8), (1, 4, 5, 8), {}),
}


def make(q_shape, k_shape):
    generator = torch.Generator().manual_seed(1)
    shapes = {"query": q_shape, "key": k_shape, "value": k_shape}
    return {name: torch.randn(s, generator=generator).requires_grad_() for name, s in shapes.items()}


def check(inputs, **options):
    check_operator(
        lambda **inputs: pypar.scaled_dot_product_attention(**inputs, **options),
        lambda **inputs: F.scaled_dot_product_attention(**inputs, **options),
        inputs,
    )


@pytest.mark.parametrize("name", CASES)
def test_same_as_torch(name):
    q_shape, k_shape, options = CASES[name]
    check(make(q_shape, k_shape), **options)


@pytest.mark.parametrize(
    "shape", [(7, 9), (1, 9), (2, 1, 7, 9), (3, 7, 9), (2, 3, 7, 9), (2, 1, 1, 9)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True
    check(make((2, 3, 7, 16), (2, 3, 9, 16)), attn_mask=mask)


def test_mask_of_more_dimensions():
    mask = torch.randn(3, 2, 1, 7, 9, generator=torch.Generator().manual_seed(2)) > 0
    mask[..., 0] = True
    check(make((3, 2, 4, 7, 16), (3, 2, 4, 9, 16)), attn_mask=mask)


def test_gradient_of_the_mask():
    """In bf16: in fp32 it is one of the gradients that exceed the rule at times (test_attention_matrix.py)."""
    inputs = {name: x.detach().bfloat16() for name, x in make((2, 3, 7, 16), (2, 3, 9, 16)).items()}
    inputs["attn_mask"] = torch.randn(1, 3, 1, 9, generator=torch.Generator().manual_seed(2)).bfloat16()
    for x in inputs.values():
        x.requires_grad_()

    def ours(attn_mask, **inputs):
        return pypar.scaled_dot_product_attention(**inputs, attn_mask=attn_mask)

    def plain(query, key, value, attn_mask):
        return ((query @ key.mT) * query.shape[-1] ** -0.5 + attn_mask).softmax(-1) @ value

    check_operator(ours, plain, inputs)


def test_row_that_sees_nothing():
    inputs = make((1, 1, 3, 8), (1, 1, 4, 8))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    out = pypar.scaled_dot_product_attention(**inputs, attn_mask=mask)
    out.sum().backward()
    assert not out[0, 0, 1].any() and out[0, 0, [0, 2]].all()
    assert all(x.grad.isfinite().all() for x in inputs.values())


def test_dropout_keeps_the_mean():
    inputs = {name: x.detach() for name, x in make((1, 2, 64, 16), (1, 2, 512, 16)).items()}
    inputs["value"] = torch.ones_like(inputs["value"])
    torch.manual_seed(0)
    out = pypar.scaled_dot_product_attention(**inputs, dropout_p=0.25)
    assert abs(out.mean().item() - 1) < 0.02 and out.std() > 0.01
    assert not torch.equal(out, pypar.scaled_dot_product_attention(**inputs, dropout_p=0.25))
    torch.manual_seed(0)
    assert torch.equal(out, pypar.scaled_dot_product_attention(**inputs, dropout_p=0.25))


def test_the_arguments_are_torchs():
    described = F.scaled_dot_product_attention.__doc__
    first = re.search(r"scaled_dot_product_attention\((.*?)\) ->", described, re.DOTALL)[1]
    theirs = [argument.split("=")[0].split(":")[0].strip() for argument in first.split(",")]
    ours = [
        name
        for name, parameter in inspect.signature(pypar.scaled_dot_product_attention).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    assert ours == theirs


def test_refusals():
    inputs = make((2, 4, 7, 16), (2, 2, 9, 16))
    with pytest.raises(ValueError, match="query has 4 heads and key 2; pass enable_gqa=True"):
        pypar.scaled_dot_product_attention(**inputs)
    with pytest.raises(ValueError, match="exclude each other"):
        pypar.scaled_dot_product_attention(
            **inputs, attn_mask=torch.ones(7, 9, dtype=torch.bool), is_causal=True
        )
    with pytest.raises(ValueError, match=r"query \(16,\) must be"):
        pypar.scaled_dot_product_attention(torch.zeros(16), inputs["key"], inputs["value"])


def test_compiles_whole():
    inputs = make((1, 2, 9, 8), (1, 2, 5, 8)).values()
    compiled = torch.compile(pypar.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    eager = pypar.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.equal(compiled(*inputs, is_causal=True), eager)
