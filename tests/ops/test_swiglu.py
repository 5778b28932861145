"""swiglu on every backend.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch

from pypar.ops.swiglu import BACKENDS, swiglu
from pypar.selftest.cases.swiglu import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.pairs import pairwise

NAMES = [backend.name for backend in BACKENDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, halves=False):
    return draw_inputs(case(shape, halves), dtype)


@pytest.mark.parametrize(
    ("halves", "shape", "dtype", "name"),
    pairwise([False, True], [(63, 1), (2, 63, 111), (1, 1023), (1023,)], DTYPES, NAMES),
)
def test_accuracy(name, dtype, shape, halves):
    check_case(case(shape, halves), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_far_gates(name):
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30], requires_grad=True)
    out = swiglu(gate, torch.ones(7), backend=name)
    out.sum().backward()
    assert torch.equal(out.clamp(min=0), gate.detach().clamp(min=0))
    assert (out <= 0)[:3].all() and (out > -1e-30)[:3].all()
    assert torch.allclose(gate.grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]), atol=1e-30)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(name, shape):
    inputs = make(shape, torch.float32)
    swiglu(**inputs, backend=name).sum().backward()
    assert inputs["gate"].grad.shape == shape


def test_same_bits_for_any_number_of_threads():
    inputs = make((1023, 111), torch.float32)
    assert_same_for_any_threads(lambda gate, up: swiglu(gate, up, backend="native"), inputs)


def test_gradient_of_the_reference():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make((5, 7), torch.float32, halves=True)
    torch.library.opcheck(torch.ops.pypar.swiglu_forward, (*inputs.values(), name))
    gate, up = (t.detach() for t in inputs.values())
    torch.library.opcheck(torch.ops.pypar.swiglu_backward, (gate, gate, up, name))


def test_compiles_as_one_graph():
    inputs = make((5, 63), torch.float32)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), swiglu(**inputs))
    compiled(**inputs).sum().backward()


@pytest.mark.parametrize("up", [torch.zeros(3, 5), torch.zeros(3, 4).double(), torch.zeros(4)])
def test_bad_input_is_named(up):
    with pytest.raises(ValueError, match="up .* must match gate"):
        swiglu(torch.zeros(3, 4), up)
