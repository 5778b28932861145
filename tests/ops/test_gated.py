"""swiglu, geglu and clamped_swiglu on every backend of a CPU; Triton's kernels: tests/gpu/test_row_kernels.py.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch
import torch.nn.functional as F

import pypar
from pypar.ops.gated import clamped_swiglu, geglu, swiglu
from pypar.selftest.cases.gated import MEMORY, OURS, case
from pypar.selftest.judge import check_case_in_draws, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAR = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30])


def make(shape, dtype, name="swiglu", memory="two tensors"):
    return draw_inputs(case(shape, name, memory), dtype)


@pytest.mark.parametrize(
    ("function", "memory", "shape", "dtype", "name"),
    pairwise(list(OURS), list(MEMORY), [(63, 1), (2, 63, 111), (1, 1023), (1023,)], DTYPES, NAMES),
)
def test_accuracy(name, dtype, shape, memory, function):
    """Some shapes have few numbers, whose largest error in one draw is luck."""
    check_case_in_draws(case(shape, function, memory), dtype, name, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", ["swiglu", "geglu", "geglu tanh"])
def test_far_gates(function, name):
    gate = FAR.clone().requires_grad_()
    out = OURS[function](gate, torch.ones(7), backend=name)
    out.sum().backward()
    assert torch.equal(out.clamp(min=0), FAR.clamp(min=0))
    assert (out <= 0)[:3].all() and (out > -1e-30)[:3].all()
    assert torch.allclose(gate.grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]), atol=1e-30)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_off_has_no_gradient(name):
    gate, up = (FAR.clone().requires_grad_() for _ in range(2))
    clamped_swiglu(gate, torch.ones(7), backend=name).sum().backward()
    clamped_swiglu(torch.ones(7), up, limit=100, backend=name).sum().backward()
    assert torch.equal(gate.grad, torch.tensor([0, 0, 0, 1.0, 0, 0, 0]))
    assert torch.equal(up.grad != 0, FAR.abs() <= 100)


@pytest.mark.parametrize("name", NAMES)
def test_the_edge_of_the_clamp_is_as_torch_has_it(name):
    """A gate or up that is the limit itself has its gradient, and what is no number stays none."""
    values = [7.0, -7.0, 7.000001, float("nan"), 3.0]
    gate, up = (torch.tensor(values, requires_grad=True) for _ in range(2))
    clamped_swiglu(gate, up.flip(0), backend=name).sum().backward()
    ours, gate.grad, up.grad = (gate.grad, up.grad), None, None
    g, u = gate.clamp(max=7), up.flip(0).clamp(-7, 7)
    ((u + 1) * g * torch.sigmoid(1.702 * g)).sum().backward()
    torch.testing.assert_close(ours, (gate.grad, up.grad), equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_geglu_keeps_its_digits_where_gates_are_negative(name):
    """1 + erf would have none left at -6."""
    gate = torch.linspace(-6, 0, 1023)
    exact = F.gelu(gate.double())
    relative = (geglu(gate, torch.ones(1023), backend=name).double() / exact - 1)[:-1].abs()
    assert relative[-300:].max() < 1e-6
    if name == "native":
        assert relative.max() < 1e-5


@pytest.mark.parametrize("memory", ["halves", "interleaved"])
@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_has_the_bits_of_two(name, memory):
    inputs = make((37, 111), torch.bfloat16, memory=memory)
    both = inputs["gate"]
    parts = (both[..., ::2], both[..., 1::2]) if memory == "interleaved" else both.chunk(2, -1)
    gate, up = (x.detach().contiguous().requires_grad_() for x in parts)
    out = swiglu(both, interleaved=memory == "interleaved", backend=name)
    apart = swiglu(gate, up, backend=name)
    assert torch.equal(out, apart)
    into = torch.randn(out.shape).bfloat16()
    out.backward(into)
    apart.backward(into)
    expected = torch.stack((gate.grad, up.grad), -1) if memory == "interleaved" else (gate.grad, up.grad)
    joined = expected.flatten(-2) if memory == "interleaved" else torch.cat(expected, -1)
    assert torch.equal(both.grad, joined)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(name, memory, shape):
    inputs = make(shape, torch.float32, memory=memory)
    swiglu(**inputs, interleaved=memory == "interleaved", backend=name).sum().backward()
    assert inputs["gate"].grad.shape == inputs["gate"].shape


@pytest.mark.parametrize("memory", ["two tensors", "interleaved"])
def test_same_bits_for_any_number_of_threads(memory):
    inputs = make((1023, 111), torch.float32, memory=memory)
    options = {"interleaved": memory == "interleaved", "backend": "native"}
    assert_same_for_any_threads(lambda **inputs: geglu(**inputs, **options), inputs)


def test_backward_keeps_the_inputs_alone():
    kept = []
    inputs = make((5, 7), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        geglu(**inputs)
    assert set(kept) == {x.data_ptr() for x in inputs.values()}


@pytest.mark.parametrize("function", list(OURS))
@pytest.mark.parametrize("memory", ["two tensors", "halves", "interleaved"])
def test_gradient_of_the_reference(memory, function):
    # Far enough from the clamps, where there is no derivative.
    inputs = {name: (x * 0.2).detach() for name, x in make((3, 7), torch.float64, function, memory).items()}
    ours = OURS[function]
    if memory == "interleaved":
        assert torch.autograd.gradcheck(lambda x: ours(x, interleaved=True), inputs["gate"].requires_grad_())
    else:
        assert torch.autograd.gradcheck(ours, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", ["two tensors", "interleaved"])
def test_opcheck(name, memory):
    inputs = make((5, 7), torch.float32, memory=memory)
    how = ("clamped_silu", 1.702, 7.0, memory == "interleaved", name)
    torch.library.opcheck(torch.ops.pypar.gated_forward, (inputs["gate"], inputs.get("up"), *how))
    gate, up = inputs["gate"].detach(), inputs["up"].detach() if "up" in inputs else None
    torch.library.opcheck(torch.ops.pypar.gated_backward, (torch.randn(5, 7), gate, up, *how))


def test_compiles_as_one_graph():
    inputs = make((5, 63), torch.float32)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), swiglu(**inputs))
    compiled(**inputs).sum().backward()


@pytest.mark.parametrize("up", [torch.zeros(3, 5), torch.zeros(3, 4).double(), torch.zeros(4)])
def test_an_up_that_does_not_fit_is_named(up):
    with pytest.raises(ValueError, match="up .* must match gate"):
        swiglu(torch.zeros(3, 4), up)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: pypar.swiglu(x[0, 0], x[0, 0]), "gate has no dimension"),
        (lambda x: pypar.swiglu(x[:, :3]), r"gate \(3, 3\) holds gate and up .* even last dimension"),
        (lambda x: pypar.swiglu(x, x, interleaved=True), "interleaved=True is for gate and up in one tensor"),
        (lambda x: pypar.geglu(x, x, approximate="erf"), "approximate is 'erf' and must be 'none' or 'tanh'"),
        (lambda x: pypar.clamped_swiglu(x, x, limit=0.0), r"limit \(0.0\) must be positive"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(3, 4))
