"""merge on every backend: two attentions over halves of the keys are one over all."""

import math

import pytest
import torch
from accuracy import check_operator

from pypar.ops.merge import BACKENDS, merge

NAMES = [backend.name for backend in BACKENDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    batch, length, heads, _ = shape
    inputs = {}
    for part in "ab":
        inputs[f"out_{part}"] = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        lse = torch.randn((batch, heads, length), generator=generator).mul(3)
        lse = lse.double() if dtype == torch.float64 else lse
        inputs[f"lse_{part}"] = lse.requires_grad_()
    return inputs


def plain(out_a, lse_a, out_b, lse_b):
    weights = torch.softmax(torch.stack((lse_a, lse_b)), 0).transpose(2, 3).unsqueeze(-1).to(out_a.dtype)
    return weights[0] * out_a + weights[1] * out_b, torch.logsumexp(torch.stack((lse_a, lse_b)), 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 63, 1, 1), (2, 63, 3, 64), (1, 1023, 2, 7)])
def test_accuracy(name, dtype, shape):
    check_operator(lambda **inputs: merge(**inputs, backend=name), plain, make(shape, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_halves_of_the_keys_are_the_whole(name):
    q, k, v = (torch.randn(2, 7, 3, 8, dtype=torch.float64) for _ in range(3))

    def attend(keys, values):
        scores = torch.einsum("btnh,bsnh->bnts", q, keys)
        return torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), values), scores.logsumexp(-1)

    out, lse = merge(*attend(k[:, :3], v[:, :3]), *attend(k[:, 3:], v[:, 3:]), backend=name)
    whole_out, whole_lse = attend(k, v)
    assert torch.allclose(out, whole_out) and torch.allclose(lse, whole_lse)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_saw_no_key(name):
    inputs = {key: x.detach().clone() for key, x in make((1, 4, 1, 5), torch.float32).items()}
    for part, rows in (("a", [1, 3]), ("b", [2, 3])):
        inputs[f"lse_{part}"][..., rows] = -math.inf
        inputs[f"out_{part}"][:, rows] = 0
    for x in inputs.values():
        x.requires_grad_()
    out, lse = merge(**inputs, backend=name)
    assert torch.equal(out[:, 1], inputs["out_b"][:, 1]) and torch.equal(out[:, 2], inputs["out_a"][:, 2])
    assert torch.equal(out[:, 3], torch.zeros(1, 1, 5)) and lse[0, 0, 3] == -math.inf
    (out.sum() + lse[..., :3].sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs.values())
    assert all(inputs[n].grad[:, 3].abs().sum() == 0 for n in ("out_a", "out_b"))
    assert all(inputs[n].grad[0, 0, 3] == 0 for n in ("lse_a", "lse_b"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 2, 0)])
def test_empty(name, shape):
    inputs = make(shape, torch.float32)
    out, lse = merge(**inputs, backend=name)
    (out.sum() + lse.sum()).backward()
    assert inputs["out_a"].grad.shape == shape


def test_gradient_of_the_reference():
    inputs = make((2, 3, 2, 5), torch.float64)
    torch.autograd.gradcheck(merge, tuple(inputs.values()))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make((2, 3, 2, 8), torch.float32)
    torch.library.opcheck(torch.ops.pypar.merge_forward, (*inputs.values(), name))
    parts = [x.detach() for x in inputs.values()]
    torch.library.opcheck(torch.ops.pypar.merge_backward, (parts[0], parts[1], *parts, name))


def test_compiles_as_one_graph():
    inputs = make((2, 7, 3, 16), torch.float32)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    out, lse = compiled(**inputs)
    assert torch.equal(out, merge(**inputs)[0])
    (out.sum() + lse.sum()).backward()


def test_bad_input_is_named():
    out, lse = torch.zeros(1, 3, 2, 8), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="out_b .* must match out_a"):
        merge(out, lse, out[..., :4], lse)
    with pytest.raises(ValueError, match="lse_b .* must be .B, N, T."):
        merge(out, lse, out, lse.transpose(1, 2))
    with pytest.raises(ValueError, match="lse_a .* float32"):
        merge(out, lse.half(), out, lse)
