"""rms_norm on every backend.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch

from pypar.ops.rms_norm import BACKENDS, rms_norm
from pypar.selftest.cases.rms_norm import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.pairs import pairwise

NAMES = [backend.name for backend in BACKENDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype):
    return draw_inputs(case(shape), dtype)


@pytest.mark.parametrize(
    ("strided", "shape", "dtype", "name"),
    pairwise([False, True], [(63, 1), (5, 63), (2, 63, 111), (1, 1023), (301, 64), (1023,)], DTYPES, NAMES),
)
def test_accuracy(name, dtype, shape, strided):
    check_case(case(shape, strided), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_any_order_of_memory(name):
    inputs = make((3, 7, 33), torch.float32)
    turned = inputs["x"].detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = rms_norm(inputs["x"], inputs["weight"], backend=name)
    assert torch.allclose(rms_norm(turned, inputs["weight"], backend=name), expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float32_weight_with_bfloat16_input(name):
    inputs = make((9, 111), torch.bfloat16)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    out = rms_norm(**inputs, backend=name)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and inputs["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,), (3, 0)])
def test_empty(name, shape):
    inputs = make(shape, torch.float32)
    rms_norm(**inputs, backend=name).sum().backward()
    assert inputs["x"].grad.shape == shape
    assert torch.equal(inputs["weight"].grad, torch.zeros(shape[-1]))


def test_same_bits_for_any_number_of_threads():
    inputs = make((1023, 111), torch.float32)
    assert_same_for_any_threads(lambda x, weight: rms_norm(x, weight, backend="native"), inputs)


def test_gradient_of_the_reference():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(rms_norm, (x, weight))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make((5, 7), torch.float32)
    torch.library.opcheck(torch.ops.pypar.rms_norm_forward, (*inputs.values(), 1e-5, name))
    x, weight = (t.detach() for t in inputs.values())
    rstd = torch.rand(5)
    torch.library.opcheck(torch.ops.pypar.rms_norm_backward, (x, x, weight, rstd, name))


def test_compiles_as_one_graph():
    inputs = make((5, 63), torch.float32)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), rms_norm(**inputs))
    compiled(**inputs).sum().backward()


@pytest.mark.parametrize(
    ("weight", "eps", "sentence"),
    [
        (torch.ones(5), 1e-5, "weight .* must be one value per element"),
        (torch.ones(1, 4), 1e-5, "weight .* must be one value per element"),
        (torch.ones(4, dtype=torch.float64), 1e-5, "weight is torch.float64 and must be torch.float32"),
        (torch.ones(4), 0.0, "eps .* must be positive"),
    ],
)
def test_bad_input_is_named(weight, eps, sentence):
    with pytest.raises(ValueError, match=sentence):
        rms_norm(torch.zeros(3, 4), weight, eps)


def test_native_says_why_it_refuses():
    with pytest.raises(ValueError, match="rms_norm: .*refuses: float64 is not one of"):
        rms_norm(torch.zeros(3, 4).double(), torch.ones(4).double(), backend="native")
