"""merge_attention on every backend of a CPU; Triton's kernels: tests/gpu/test_row_kernels.py."""

import pytest
import torch

import pypar
from pypar.ops import native
from pypar.ops.merge_attention import merge_attention
from pypar.selftest.cases.merge_attention import case
from pypar.selftest.judge import check_case, check_case_in_draws, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads, instruction_set
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, (2, 7, 3, 24)), (5, (9, 2, 111)), (1, (1, 1, 1, 1)), (3, (1, 31, 2, 64))]


@pytest.mark.parametrize(("sizes", "hidden", "dtype", "name"), pairwise(SHAPES, [False, True], DTYPES, NAMES))
def test_accuracy(name, dtype, hidden, sizes):
    """The gradients of lses are few numbers, in fp32 beside 16 bits too."""
    check_case_in_draws(case(*sizes, hidden=hidden), dtype, name, 4)


@pytest.mark.parametrize("isa", native.module().supported_isas())
def test_every_instruction_set(isa):
    with instruction_set(isa):
        for dtype in DTYPES:
            check_case(case(3, (2, 7, 3, 33), hidden=True), dtype, "native")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_parts_of_the_keys_make_the_whole(name, causal):
    """Causal: the first queries see nothing of the second part."""
    q, k, v = torch.randn(3, 2, 10, 2, 16).unbind()
    bias = torch.zeros(1, 1, 10, 10).masked_fill(torch.ones(10, 10).triu(1).bool() & causal, -torch.inf)
    expected, expected_lse = pypar.attention(q, k, v, causal=causal, return_lse=True)
    parts = [
        pypar.attention(q, k[:, part], v[:, part], bias=bias[..., part], return_lse=True)
        for part in (slice(6), slice(6, 10))
    ]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    assert bool(lses.isinf().any()) == causal
    out, lse = merge_attention(outs, lses, backend=name)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_saw_nothing_is_not_read(name):
    outs = torch.full((2, 1, 1, 4), torch.nan)
    outs[0] = 3.0
    outs.requires_grad_()
    lses = torch.tensor([[[1.5]], [[-torch.inf]]], requires_grad=True)
    out, lse = merge_attention(outs, lses, backend=name)
    assert out.tolist() == [[[3.0] * 4]] and lse.item() == 1.5
    (out.sum() + lse.sum()).backward()
    assert outs.grad.flatten().tolist() == [1.0] * 4 + [0.0] * 4 and lses.grad.flatten().tolist() == [
        1.0,
        0.0,
    ]
    nothing = torch.full((2, 1, 1), -torch.inf, requires_grad=True)
    outs = torch.full((2, 1, 1, 4), torch.nan, requires_grad=True)
    out, lse = merge_attention(outs, nothing, backend=name)
    assert not out.any() and lse.item() == -torch.inf
    (out.sum() + lse.sum()).backward()
    assert not outs.grad.any() and not nothing.grad.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_output_alone(name, used):
    inputs = draw_inputs(case(2, (5, 3, 8)), torch.float32)
    out, lse = merge_attention(**inputs, backend=name)
    (out if used == "out" else lse).square().sum().backward()
    wide = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    found = merge_attention(**wide, backend="reference")
    found[used == "lse"].square().sum().backward()
    for key, x in inputs.items():
        torch.testing.assert_close(x.grad, wide[key].grad.float(), rtol=1e-4, atol=1e-5)


def test_large_sums_do_not_overflow():
    outs, lses = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.full((2, 1, 1), 1e4)
    out, lse = merge_attention(outs, lses)
    assert out.item() == 2.0 and lse.item() == pytest.approx(1e4 + 0.6931, rel=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (3, 2, 0)])
def test_empty(name, shape):
    inputs = draw_inputs(case(2, shape), torch.float32)
    out, lse = merge_attention(**inputs, backend=name)
    (out.sum() + lse.sum()).backward()
    assert out.shape == shape and inputs["outs"].grad.shape == (2, *shape)


def test_same_bits_for_any_number_of_threads():
    inputs = draw_inputs(case(3, (101, 7, 64), hidden=True), torch.float32)
    assert_same_for_any_threads(lambda **inputs: merge_attention(**inputs, backend="native"), inputs)


def test_gradient_of_the_reference():
    outs = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(merge_attention, (outs, lses))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    outs, lses = draw_inputs(case(2, (5, 3, 8)), torch.float32).values()
    torch.library.opcheck(torch.ops.pypar.merge_attention_forward, (outs, lses, name))
    outs, lses = outs.detach(), lses.detach()
    given = (outs[0], lses[0], outs, lses, lses.logsumexp(0), name)
    torch.library.opcheck(torch.ops.pypar.merge_attention_backward, given)


def test_compiles_as_one_graph():
    inputs = draw_inputs(case(2, (5, 3, 8)), torch.float32)
    found = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")(**inputs)
    for x, expected in zip(found, merge_attention(**inputs), strict=True):
        assert torch.equal(x, expected)
    found[0].sum().backward()


@pytest.mark.parametrize(
    ("outs", "lses", "sentence"),
    [
        (torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 3), r"outs \(2, 5, 3, 8\) must be .* torch.stack"),
        (torch.zeros(5, 3, 8), torch.zeros(3, 5), r"outs \(5, 3, 8\) must be"),
        (torch.zeros(0, 5, 3, 8), torch.zeros(0, 3, 5), "outs has no part"),
        (torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5).double(), "lses is torch.float64 and must be"),
    ],
)
def test_bad_input_is_named(outs, lses, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_attention(outs, lses)
