"""rms_norm on every backend of a CPU; Triton's kernels: tests/gpu/test_row_kernels.py.

The long tests have every combination, the quick ones every pair.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pypar.ops.rms_norm import RMSNorm, rms_norm
from pypar.selftest.cases.rms_norm import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.norms import assert_compiles_as_one_graph, assert_same_in_parts, opcheck_norm
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {"strided": True},
    {"residual": True},
    {"residual": True, "weight_offset": 1.0, "strided": True},
    {"weight": False},
    {"weight": False, "residual": True},
]


def make(shape, dtype, **options):
    return draw_inputs(case(shape, **options), dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "name"),
    pairwise([(63, 1), (5, 63), (2, 63, 111), (1, 1023), (301, 64), (1023,)], DTYPES, NAMES),
)
def test_accuracy(name, dtype, shape):
    check_case(case(shape), dtype, name)


@pytest.mark.parametrize(("options", "dtype", "name"), pairwise(OPTIONS, DTYPES, NAMES))
def test_options(name, dtype, options):
    check_case(case((2, 33, 111), **options), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_any_order_of_memory(name):
    inputs = make((3, 7, 33), torch.float32)
    turned = inputs["x"].detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = rms_norm(inputs["x"], inputs["weight"], backend=name)
    assert torch.allclose(rms_norm(turned, inputs["weight"], backend=name), expected, atol=1e-6)
    out, total = rms_norm(inputs["x"], inputs["weight"], residual=turned, backend=name)
    assert torch.equal(total, 2 * inputs["x"])
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float32_weight_with_bfloat16_input(name):
    inputs = make((9, 111), torch.bfloat16)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    out = rms_norm(**inputs, backend=name)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and inputs["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,), (3, 0)])
def test_empty(name, residual, shape):
    inputs = make(shape, torch.float32, residual=residual)
    outs = rms_norm(**inputs, backend=name)
    sum(out.sum() for out in (outs if residual else [outs])).backward()
    assert all(inputs[key].grad.shape == shape for key in inputs if key != "weight")
    assert torch.equal(inputs["weight"].grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("residual", [False, True])
def test_results_larger_than_caches_have_the_bits_of_smaller_ones(residual):
    """They are stored past the caches."""
    assert_same_in_parts(rms_norm, make((4096, 1024), torch.float32, residual=residual))


@pytest.mark.parametrize("residual", [False, True])
def test_same_bits_for_any_number_of_threads(residual):
    inputs = make((1023, 111), torch.float32, residual=residual)
    assert_same_for_any_threads(lambda **inputs: rms_norm(**inputs, backend="native"), inputs)


@pytest.mark.parametrize("used", ["out", "sum"])
def test_one_output_alone_has_the_gradient_of_that_output(used):
    """As in a model's last layer, whose sum nobody uses."""
    inputs = make((9, 33), torch.float32, residual=True)
    out, total = rms_norm(**inputs)
    (out if used == "out" else total).square().sum().backward()
    plain = {key: x.detach().clone().requires_grad_() for key, x in inputs.items()}
    sums = plain["x"] + plain["residual"]
    (F.rms_norm(sums, (33,), plain["weight"], 1e-5) if used == "out" else sums).square().sum().backward()
    for key, x in inputs.items():
        torch.testing.assert_close(x.grad, plain[key].grad)


def test_gradient_of_the_reference():
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(rms_norm, (x, weight))
    torch.autograd.gradcheck(
        lambda x, weight, residual: rms_norm(x, weight, residual=residual, weight_offset=1.0),
        (x, weight, residual),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(name, residual):
    opcheck_norm("rms_norm", make((5, 7), torch.float32, residual=residual), name)


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_as_one_graph(residual):
    assert_compiles_as_one_graph(rms_norm, make((5, 63), torch.float32, residual=residual))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": torch.ones(5)}, "weight .* must be one value per element"),
        ({"weight": torch.ones(1, 4)}, "weight .* must be one value per element"),
        ({"weight": torch.ones(4).double()}, "weight is torch.float64 and must be torch.float32"),
        ({"eps": 0.0}, "eps .* must be positive"),
        ({"residual": torch.zeros(4)}, r"residual \(4,\) torch.float32 must be like x \(3, 4\)"),
        ({"residual": torch.zeros(3, 4).double()}, "residual .*float64 must be like x"),
    ],
)
def test_bad_input_is_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        rms_norm(torch.zeros(3, 4), **options)


def test_native_says_why_it_refuses():
    with pytest.raises(ValueError, match="rms_norm: .*refuses: float64 is not one of"):
        rms_norm(torch.zeros(3, 4).double(), torch.ones(4).double(), backend="native")


def test_triton_says_why_it_refuses():
    with pytest.raises(ValueError, match="rms_norm: .*refuses: a row has 9000 elements, and 8192 fit"):
        rms_norm(torch.zeros(1, 9000), backend="triton")


@pytest.mark.parametrize(
    "arguments",
    [{"normalized_shape": 12, "eps": 1e-6}, {"normalized_shape": (3, 4)}, {"normalized_shape": [12]}],
)
@pytest.mark.parametrize("elementwise_affine", [True, False])
def test_module_is_torchs(arguments, elementwise_affine):
    """Values, gradients, state_dict and repr; each loads what the other saved."""
    theirs = nn.RMSNorm(**arguments, elementwise_affine=elementwise_affine)
    ours = RMSNorm(**arguments, elementwise_affine=elementwise_affine)
    if elementwise_affine:
        nn.init.normal_(theirs.weight)
    saved = io.BytesIO()
    torch.save(theirs.state_dict(), saved)
    saved.seek(0)
    ours.load_state_dict(torch.load(saved))
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs) and isinstance(copy.deepcopy(ours), nn.RMSNorm)
    x = torch.randn(5, *ours.normalized_shape, requires_grad=True)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    wanted = [x, *ours.parameters()]
    for found, plain in zip(
        torch.autograd.grad(out, wanted, dout),
        torch.autograd.grad(expected, [x, *theirs.parameters()], dout),
        strict=True,
    ):
        torch.testing.assert_close(found, plain)


def test_module_with_residual_and_weights_around_zero():
    module = RMSNorm(12, eps=1e-6, weight_offset=1.0)
    assert not module.weight.any()
    x, residual = torch.randn(2, 5, 12).unbind()
    out, total = module(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, F.rms_norm(total, (12,), eps=1e-6))
    with pytest.raises(ValueError, match=r"x \(5, 11\) must end with normalized_shape \(12,\)"):
        module(x[..., :11])
