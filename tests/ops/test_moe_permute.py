"""moe_permute and moe_combine on every backend of a CPU; Triton's kernels: tests/gpu/test_row_kernels.py.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch

from pypar.ops import native
from pypar.ops.moe_permute import moe_combine, moe_permute
from pypar.selftest.cases.moe_permute import case, combine_case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads, instruction_set
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(63, 111, 5, 3), (1, 1, 1, 1), (30, 64, 70, 2), (7, 1023, 3, 8)]
OPTIONS = [{}, {"dropped": True}, {"strided": True}, {"dropped": True, "strided": True}]


@pytest.mark.parametrize(
    ("op", "sizes", "options", "dtype", "name"),
    pairwise(["permute", "combine"], SIZES, OPTIONS, DTYPES, NAMES),
)
def test_accuracy(op, name, dtype, options, sizes):
    make = case if op == "permute" else combine_case
    check_case(make(*sizes, **options), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_without_weights(name):
    check_case(combine_case(33, 111, 5, 2, weighted=False, dropped=True), torch.bfloat16, name)


@pytest.mark.parametrize("isa", native.module().supported_isas())
def test_every_instruction_set(isa):
    with instruction_set(isa):
        for dtype in DTYPES:
            check_case(case(63, 111, 5, 3), dtype, "native")
            check_case(combine_case(63, 111, 5, 3), dtype, "native")


def sorted_by_hand(experts, num_experts):
    """(counts, sources), by looking at one choice after the other."""
    flat = experts.flatten().tolist()
    groups = [[i for i, e in enumerate(flat) if e == expert] for expert in (*range(num_experts), -1)]
    return [len(group) for group in groups[:-1]], [i for group in groups for i in group]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("routing", ["any", "all to one", "some dropped", "all dropped"])
def test_order(name, routing):
    """Stable within an expert, exact counts, empty experts, and what nobody takes at the end."""
    experts = torch.randint(0, 6, (5000, 2), generator=torch.Generator().manual_seed(0))
    if routing == "all to one":
        experts.fill_(3)
    elif routing != "any":
        experts[:: 1 if routing == "all dropped" else 3] = -1
    x = torch.arange(5000.0).unsqueeze(1) + 1
    rows, counts, places, sources = moe_permute(x, experts, 9, backend=name)
    expected_counts, expected_sources = sorted_by_hand(experts, 9)
    assert counts.tolist() == expected_counts and sources.tolist() == expected_sources
    assert counts.dtype == places.dtype == torch.int64
    used = int(counts.sum())
    assert torch.equal(rows[:used], x[sources[:used] // 2]) and not rows[used:].any()
    flat = places.flatten()
    assert torch.equal(flat < 0, experts.flatten() < 0)
    assert torch.equal(sources[torch.where(flat < 0, -1 - flat, flat)], torch.arange(10000))
    kept = (experts >= 0).sum(1, keepdim=True)
    assert torch.equal(moe_combine(rows, places, backend=name), x * kept)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_is_not_read_and_has_no_gradient(name):
    experts = torch.tensor([[0, -1], [-1, -1], [1, 0]])
    places = moe_permute(torch.zeros(3, 4), experts, 2).places
    rows = torch.ones(6, 4)
    rows[3:] = torch.nan
    rows.requires_grad_()
    weights = torch.full((3, 2), 2.0, requires_grad=True)
    out = moe_combine(rows, places, weights, backend=name)
    assert out[:, 0].tolist() == [2.0, 0.0, 4.0]
    out.sum().backward()
    assert rows.grad[:, 0].tolist() == [2.0] * 3 + [0.0] * 3
    assert weights.grad.tolist() == [[4.0, 0.0], [0.0, 0.0], [4.0, 4.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tokens", "size", "k"), [(0, 8, 2), (3, 0, 2), (3, 8, 0)])
def test_empty(name, tokens, size, k):
    x = torch.ones(tokens, size, requires_grad=True)
    weights = torch.ones(tokens, k, requires_grad=True)
    permuted = moe_permute(x, torch.zeros(tokens, k, dtype=torch.int64), 3, backend=name)
    assert permuted.counts.tolist() == [tokens * k, 0, 0]
    out = moe_combine(permuted.rows, permuted.places, weights, backend=name)
    out.sum().backward()
    assert out.shape == x.grad.shape == (tokens, size) and weights.grad.shape == (tokens, k)


@pytest.mark.parametrize("make", [case, combine_case])
def test_same_bits_for_any_number_of_threads(make):
    given = make(1023, 111, 7, 3, dropped=True)
    inputs = draw_inputs(given, torch.float32)
    assert_same_for_any_threads(lambda **inputs: given.ours(**inputs, backend="native"), inputs)


def test_order_is_the_same_for_any_number_of_threads():
    experts = torch.randint(-1, 50, (20000, 2), generator=torch.Generator().manual_seed(0))
    assert_same_for_any_threads(
        lambda experts: moe_permute(torch.zeros(20000, 0), experts, 50)[2:], {"experts": experts}
    )


def test_weights_of_rows_dtype_and_frozen_weights():
    inputs = draw_inputs(combine_case(9, 33, 4, 2), torch.bfloat16)
    inputs["weights"] = inputs["weights"].detach().bfloat16().requires_grad_()
    moe_combine(**inputs).sum().backward()
    assert inputs["weights"].grad.dtype == torch.bfloat16
    inputs["weights"].grad = None
    inputs["weights"].requires_grad_(False)
    moe_combine(**inputs).sum().backward()
    assert inputs["weights"].grad is None


def test_gradient_of_the_reference():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0, 2], [-1, 0], [2, 2], [1, -1]])

    def both(x, weights):
        rows, _, places, _ = moe_permute(x, experts, 3)
        return moe_combine(rows * torch.arange(8).unsqueeze(1), places, weights)

    torch.autograd.gradcheck(both, (x, weights))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = draw_inputs(combine_case(5, 7, 3, 2, dropped=True), torch.float32)
    rows, places, weights = inputs.values()
    x, ops = torch.randn(5, 7, requires_grad=True), torch.ops.pypar
    torch.library.opcheck(ops.moe_permute_order, (torch.randint(-1, 3, (5, 2)), 3, name))
    torch.library.opcheck(ops.moe_permute_forward, (x, places, name))
    torch.library.opcheck(ops.moe_permute_backward, (rows.detach(), places, name))
    torch.library.opcheck(ops.moe_permute_combine_forward, (rows, places, weights, name))
    given = (x.detach(), rows.detach(), places, weights.detach(), name)
    torch.library.opcheck(ops.moe_permute_combine_backward, given)


def test_compiles_as_one_graph():
    def layer(x, experts, weights):
        rows, counts, places, _ = moe_permute(x, experts, 4)
        return moe_combine(rows * 2, places, weights), counts

    x, weights = torch.randn(9, 33, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    experts = torch.randint(-1, 4, (9, 2))
    out, counts = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, experts, weights)
    expected, expected_counts = layer(x, experts, weights)
    assert torch.equal(out, expected) and torch.equal(counts, expected_counts)
    out.sum().backward()


ONE = torch.zeros(3, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: moe_permute(torch.zeros(3, 4), ONE[:2], 2), r"x \(3, 4\) must be \[T, D\] and experts"),
        (lambda: moe_permute(torch.zeros(1, 3, 4), ONE, 2), "flatten the dimensions"),
        (lambda: moe_permute(torch.zeros(3, 4), ONE.int(), 2), "experts is torch.int32 and must be int64"),
        (lambda: moe_permute(torch.zeros(3, 4), ONE, 0), r"num_experts \(0\) must be positive"),
        (
            lambda: moe_permute(torch.zeros(3, 4), ONE + 2, 2),
            r"experts contains 2, .* \[0, num_experts = 2\)",
        ),
        (lambda: moe_permute(torch.zeros(3, 4), ONE - 2, 2, backend="reference"), "experts contains -2"),
        (
            lambda: moe_combine(torch.zeros(4, 4), ONE),
            r"rows \(4, 4\) must be \[T k, D\] and places \(3, 1\)",
        ),
        (lambda: moe_combine(torch.zeros(3, 4), ONE), "places must name each row of"),
        (
            lambda: moe_combine(torch.zeros(3, 4), ONE + 7, backend="reference"),
            "places must name each row of",
        ),
        (
            lambda: moe_combine(torch.zeros(3, 4), ONE, torch.zeros(3)),
            r"weights \(3,\) torch.float32 must be",
        ),
        (
            lambda: moe_combine(torch.zeros(3, 4), ONE, torch.zeros(3, 1).double()),
            "weights .*float64 must be .* of torch.float32, as rows, or float32",
        ),
        (
            lambda: moe_permute(torch.zeros(3, 4).double(), ONE, 2, backend="native"),
            "moe_permute: .*refuses: float64 is not one of",
        ),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
