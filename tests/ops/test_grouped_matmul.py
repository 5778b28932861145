"""grouped_matmul on every backend of a CPU; Triton's kernels: tests/gpu/test_expert_kernels.py."""

import pytest
import torch

from pypar.ops import native
from pypar.ops.grouped_matmul import grouped_matmul
from pypar.ops.grouped_matmul import native as native_backend
from pypar.selftest.cases.grouped_matmul import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads, instruction_set
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [(3, 0, 16, 1), (0, 0, 2), (33, 5), (1,)]
SIZES = [(40, 24), (111, 63), (1, 1), (700, 70)]  # the last: more terms than one chunk
OPTIONS = [{}, {"transposed": True}, {"strided": True, "unused": 3}]


@pytest.mark.parametrize(
    ("counts", "sizes", "options", "dtype", "name"), pairwise(COUNTS, SIZES, OPTIONS, DTYPES, NAMES)
)
def test_accuracy(name, dtype, options, sizes, counts):
    check_case(case(counts, *sizes, **options), dtype, name)


@pytest.mark.parametrize("isa", native.module().supported_isas())
@pytest.mark.parametrize("transposed", [False, True])
def test_every_instruction_set(isa, transposed):
    with instruction_set(isa):
        for dtype in DTYPES:
            check_case(case((5, 0, 17), 111, 70, transposed=transposed), dtype, "native")


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_large_groups_by_either_road(monkeypatch, limit):
    """More rows than any chunk of the kernel, and the library's products for every group."""
    monkeypatch.setattr(native_backend, "_FEW", limit)
    monkeypatch.setattr(native_backend, "torch_multiplies_fast", lambda dtype: True)
    for transposed in (False, True):
        check_case(case((130, 0, 3), 300, 530, transposed=transposed), torch.float32, "native")


@pytest.mark.parametrize("name", NAMES)
def test_experts_without_rows_have_a_gradient_of_zeros(name):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 5, 8, requires_grad=True)
    counts = torch.tensor([0, 2, 0])
    out = grouped_matmul(x, weight, counts, backend=name)
    assert not out[2:].any()
    out.sum().backward()
    assert not weight.grad[::2].any() and weight.grad[1].any() and not x.grad[2:].any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_past_the_last_group_are_not_read(name):
    x = torch.ones(4, 8)
    x[2:] = torch.nan
    weight = torch.ones(2, 3, 8, requires_grad=True)
    out = grouped_matmul(x, weight, torch.tensor([1, 1]), backend=name)
    assert out.tolist() == [[8.0] * 3] * 2 + [[0.0] * 3] * 2
    out.backward(torch.full((4, 3), 1.0))
    assert torch.equal(weight.grad, torch.ones(2, 3, 8))


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_any_strides(name):
    inputs = draw_inputs(case((3, 0, 2), 12, 10), torch.float32)
    expected = grouped_matmul(**inputs)
    weight = torch.empty(10, 12, 3, 2)[..., 0].permute(2, 0, 1).copy_(inputs["weight"].detach())
    assert 1 not in weight.stride()
    weight.requires_grad_()
    out = grouped_matmul(inputs["x"], weight, inputs["counts"], backend=name)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(weight.grad, inputs["weight"].grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("counts", "in_features", "out_features"), [((), 4, 3), ((0, 0), 4, 3), ((2, 1), 0, 3), ((2, 1), 4, 0)]
)
def test_empty(name, counts, in_features, out_features):
    inputs = {
        "x": torch.ones(sum(counts), in_features, requires_grad=True),
        "weight": torch.ones(len(counts), out_features, in_features, requires_grad=True),
    }
    out = grouped_matmul(**inputs, counts=torch.tensor(counts, dtype=torch.int64), backend=name)
    out.sum().backward()
    assert out.shape == (sum(counts), out_features) and not out.any()
    assert all(not x.grad.any() and x.grad.shape == x.shape for x in inputs.values())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    inputs = draw_inputs(case((3, 0, 16, 1, 30), 111, 300), dtype)
    assert_same_for_any_threads(lambda **inputs: grouped_matmul(**inputs, backend="native"), inputs)


def test_a_row_does_not_depend_on_its_neighbours():
    """A token's result is the same whoever shares its expert, up to the size that goes to the library."""
    inputs = draw_inputs(case((16,), 111, 70), torch.float32)
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    whole = grouped_matmul(x, weight, torch.tensor([16]), backend="native")
    for i in (0, 5, 15):
        assert torch.equal(
            grouped_matmul(x[i : i + 1], weight, torch.tensor([1]), backend="native")[0], whole[i]
        )


def test_only_wanted_gradients_are_computed():
    inputs = draw_inputs(case((3, 2), 12, 10), torch.float32)
    inputs["weight"].requires_grad_(False)
    grouped_matmul(**inputs).sum().backward()
    assert inputs["weight"].grad is None and inputs["x"].grad is not None


def test_gradient_of_the_reference():
    x, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (3, 2, 3))
    )
    torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, torch.tensor([3, 0, 1])), (x, weight))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, transposed):
    x, weight, counts = draw_inputs(case((3, 0, 2), 7, 5, transposed=transposed), torch.float32).values()
    ops, dout = torch.ops.pypar, torch.randn(5, 5)
    torch.library.opcheck(ops.grouped_matmul_forward, (x, weight, counts, name))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(ops.grouped_matmul_input_gradient, (dout, weight, counts, name))
    torch.library.opcheck(ops.grouped_matmul_weight_gradient, (dout, x, weight, counts, name))


def test_compiles_as_one_graph():
    inputs = draw_inputs(case((3, 0, 2), 40, 24), torch.float32)
    out = torch.compile(grouped_matmul, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(out, grouped_matmul(**inputs))
    out.sum().backward()


X, WEIGHT, TWO = torch.zeros(5, 4), torch.zeros(2, 3, 4), torch.tensor([2, 3])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((X[:, :3], WEIGHT, TWO), r"x \(5, 3\) must be \[R, K\] and weight \(2, 3, 4\)"),
        ((X, WEIGHT[0], TWO), "x .* must be"),
        ((X.bfloat16(), WEIGHT, TWO), "weight is torch.float32 and x torch.bfloat16"),
        ((X, WEIGHT, TWO.int()), r"counts \(2,\) torch.int32 on cpu must be \[E\] = \(2,\), int64"),
        ((X, WEIGHT, TWO[:1]), "counts .* must be"),
        ((X, WEIGHT, TWO + 1), "counts add up to 7 and there are 5 rows"),
        ((X, WEIGHT, TWO - 3), r"counts\[0\] is -1, and a group has 0 rows or more"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        grouped_matmul(*arguments, backend=name)
