"""rope on every backend.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch

from pypar.ops.rope import BACKENDS, rope
from pypar.selftest.cases.rope import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.pairs import pairwise

NAMES = [backend.name for backend in BACKENDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, memory="contiguous"):
    return draw_inputs(case(shape, memory), dtype)


@pytest.mark.parametrize(
    ("memory", "shape", "dtype", "name"),
    pairwise(
        ["contiguous", "heads before positions", "some heads", "every second"],
        [(1, 63, 1, 2), (2, 63, 3, 64), (1, 111, 5, 46), (1, 1023, 1, 30)],
        DTYPES,
        NAMES,
    ),
)
def test_accuracy(name, dtype, shape, memory):
    check_case(case(shape, memory), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_turning_back_restores(name):
    inputs = make((2, 63, 3, 64), torch.float32)
    turned = rope(**inputs, backend=name)
    back = rope(turned, inputs["cos"], -inputs["sin"], backend=name)
    assert torch.allclose(back, inputs["x"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)])
def test_empty(name, shape):
    inputs = make(shape, torch.float32)
    rope(**inputs, backend=name).sum().backward()
    assert inputs["x"].grad.shape == shape


def test_same_bits_for_any_number_of_threads():
    inputs = make((2, 111, 8, 64), torch.float32)
    assert_same_for_any_threads(lambda x, cos, sin: rope(x, cos, sin, backend="native"), inputs)


def test_gradient_of_the_reference():
    inputs = make((2, 3, 2, 6), torch.float64)
    torch.autograd.gradcheck(rope, tuple(inputs.values()))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make((2, 3, 2, 8), torch.float32, "heads before positions")
    torch.library.opcheck(torch.ops.pypar.rope_forward, (*inputs.values(), name))
    inputs["x"] = inputs["x"].detach()
    torch.library.opcheck(torch.ops.pypar.rope_backward, (*inputs.values(), name))


def test_compiles_as_one_graph():
    inputs = make((2, 7, 3, 16), torch.float32)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), rope(**inputs))
    compiled(**inputs).sum().backward()


@pytest.mark.parametrize(
    ("x", "cos", "sin", "sentence"),
    [
        (torch.zeros(3, 2, 8), torch.zeros(3, 4), torch.zeros(3, 4), "x .* must be .B, T, N, H."),
        (torch.zeros(1, 3, 2, 7), torch.zeros(3, 3), torch.zeros(3, 3), "x .* even H"),
        (torch.zeros(1, 3, 2, 8), torch.zeros(3, 8), torch.zeros(3, 4), "cos .* must be .T, H/2."),
        (torch.zeros(1, 3, 2, 8), torch.zeros(3, 4), torch.zeros(4, 4), "sin .* must be .T, H/2."),
        (torch.zeros(1, 3, 2, 8), torch.zeros(3, 4), torch.zeros(3, 4).half(), "sin is .* must be float32"),
    ],
)
def test_bad_input_is_named(x, cos, sin, sentence):
    with pytest.raises(ValueError, match=sentence):
        rope(x, cos, sin)
