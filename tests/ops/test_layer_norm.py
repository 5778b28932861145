"""layer_norm on every backend of a CPU: what it has beside rms_norm, whose tests hold what both share.

Triton's kernels: tests/gpu/test_row_kernels.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pypar.ops.layer_norm import LayerNorm, layer_norm
from pypar.selftest.cases.layer_norm import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.norms import assert_compiles_as_one_graph, assert_same_in_parts, opcheck_norm

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {"strided": True},
    {"residual": True},
    {"residual": True, "weight_offset": 1.0, "strided": True},
    {"vectors": ()},
    {"vectors": ("weight",), "residual": True},
    {"vectors": ("bias",)},
]


def make(shape, dtype=torch.float32, **options):
    return draw_inputs(case(shape, **options), dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 3), (5, 63), (2, 63, 111), (1, 1023), (301, 64), (1023,)])
def test_accuracy(name, dtype, shape):
    check_case(case(shape), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_one_element_are_the_bias(name):
    """The bias's gradient is then one number, of which plain PyTorch's error is luck: a sum's bound is the rule."""
    dout = torch.randn(63, 1, generator=torch.Generator().manual_seed(0))
    x, weight, bias = (torch.full(shape, 3.0, requires_grad=True) for shape in ((63, 1), (1,), (1,)))
    out = layer_norm(x, weight, bias, backend=name)
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), dout)
    assert (out == 3).all() and not dx.any() and not dweight.any()
    assert abs(dbias.double() - dout.double().sum()) <= 63 * 2**-24 * dout.double().abs().sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(name, dtype, options):
    check_case(case((2, 33, 111), **options), dtype, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mean", [30.0, 1000.0])
def test_a_mean_far_from_zero(name, mean):
    """mean(x^2) - mean(x)^2 would lose the variance."""
    check_case(case((33, 1023), mean=mean), torch.float32, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,), (3, 0)])
def test_empty(name, shape):
    inputs = make(shape)
    layer_norm(**inputs, backend=name).sum().backward()
    assert inputs["x"].grad.shape == shape
    assert torch.equal(inputs["bias"].grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("residual", [False, True])
def test_results_larger_than_caches_have_the_bits_of_smaller_ones(residual):
    """They are stored past the caches."""
    assert_same_in_parts(layer_norm, make((4096, 1024), residual=residual))


@pytest.mark.parametrize("residual", [False, True])
def test_same_bits_for_any_number_of_threads(residual):
    inputs = make((1023, 111), residual=residual)
    assert_same_for_any_threads(lambda **inputs: layer_norm(**inputs, backend="native"), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_their_own_dtypes(name):
    inputs = make((9, 111), torch.bfloat16)
    inputs["bias"] = inputs["bias"].detach().float().requires_grad_()
    layer_norm(**inputs, backend=name).sum().backward()
    assert inputs["weight"].grad.dtype == torch.bfloat16 and inputs["bias"].grad.dtype == torch.float32


def test_gradient_of_the_reference():
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    torch.autograd.gradcheck(
        lambda x, weight, bias, residual: layer_norm(x, weight, bias, residual=residual),
        (x, weight, bias, residual),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(name, residual):
    opcheck_norm("layer_norm", make((5, 7), residual=residual), name)


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_as_one_graph(residual):
    assert_compiles_as_one_graph(layer_norm, make((5, 63), residual=residual))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="bias .* must be one value per element"):
        layer_norm(torch.zeros(3, 4), bias=torch.zeros(3))
    with pytest.raises(ValueError, match="bias is torch.float64 and must be torch.float32"):
        layer_norm(torch.zeros(3, 4), bias=torch.zeros(4).double())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [12, (3, 4)])
def test_module_is_torchs(options, shape):
    """Values, gradients, state_dict and repr."""
    theirs, ours = nn.LayerNorm(shape, 1e-6, **options), LayerNorm(shape, 1e-6, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(5, *ours.normalized_shape, requires_grad=True)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for found, plain in zip(
        torch.autograd.grad(out, [x, *ours.parameters()], dout),
        torch.autograd.grad(expected, [x, *theirs.parameters()], dout),
        strict=True,
    ):
        torch.testing.assert_close(found, plain)


def test_module_with_residual():
    module = LayerNorm(12, weight_offset=1.0)
    x, residual = torch.randn(2, 5, 12).unbind()
    out, total = module(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, F.layer_norm(total, (12,)))
