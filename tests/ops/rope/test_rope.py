"""rope on every backend of a CPU; Triton's kernel: tests/gpu/test_row_kernels.py.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch

import pypar
from pypar.ops.rope import rope
from pypar.selftest.cases.rope import MEMORY, case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, memory="contiguous", **options):
    return draw_inputs(case(shape, memory, **options), dtype)


@pytest.mark.parametrize(
    ("memory", "shape", "dtype", "name", "kv_heads", "interleaved", "positions"),
    pairwise(
        list(MEMORY),
        [(1, 63, 1, 2), (2, 63, 3, 64), (1, 111, 5, 46), (1, 1023, 1, 30)],
        DTYPES,
        NAMES,
        [None, 2],
        [False, True],
        ["", "T", "B, T", "tables of each"],
    ),
)
def test_accuracy(name, dtype, shape, memory, kv_heads, interleaved, positions):
    options = {"kv_heads": kv_heads, "interleaved": interleaved, "positions": positions}
    check_case(case(shape, memory, **options), dtype, name)


@pytest.mark.parametrize(
    ("rotary", "memory", "dtype", "name", "interleaved"),
    pairwise([2, 20, 46], list(MEMORY), DTYPES, NAMES, [False, True]),
)
def test_only_some_features_turn(name, dtype, memory, rotary, interleaved):
    options = {"kv_heads": 1, "rotary": rotary, "interleaved": interleaved}
    check_case(case((2, 13, 3, 46), memory, **options), dtype, name)
    inputs = make((2, 13, 3, 46), dtype, memory, **options)
    q, k = rope(**inputs, interleaved=interleaved, backend=name)
    assert torch.equal(q[..., rotary:], inputs["q"][..., rotary:])
    assert torch.equal(k[..., rotary:], inputs["k"][..., rotary:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back_restores(name, interleaved):
    inputs = make((2, 63, 3, 64), torch.float32)
    options = {"interleaved": interleaved, "backend": name}
    turned = rope(**inputs, **options)
    back = rope(turned, inputs["cos"], -inputs["sin"], **options)
    assert torch.allclose(back, inputs["q"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_rows_of_the_tables(name):
    """An offset, the same as numbers, and the rows themselves give the same bits."""
    inputs = make((2, 7, 3, 16), torch.bfloat16, kv_heads=1)
    angles = torch.rand(30, 8) * 100
    cos, sin = angles.cos(), angles.sin()
    q, k = inputs["q"], inputs["k"]
    offset = rope(q, cos, sin, k, positions=11, backend=name)
    rows = torch.arange(11, 18)
    for other in (
        rope(q, cos[11:18], sin[11:18], k, backend=name),
        rope(q, cos, sin, k, positions=rows, backend=name),
        rope(q, cos, sin, k, positions=rows.expand(2, 7), backend=name),
        rope(q, cos[11:18].expand(2, 7, 8), sin[11:18].expand(2, 7, 8), k, backend=name),
        rope(q, cos[None, 11:18], sin[None, 11:18], k, backend=name),
        (rope(q, cos, sin, positions=11, backend=name), rope(k, cos, sin, positions=11, backend=name)),
    ):
        assert torch.equal(offset[0], other[0]) and torch.equal(offset[1], other[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", list(MEMORY))
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(name, memory, interleaved):
    options = {"interleaved": interleaved, "backend": name}
    inputs = {
        name: x.detach()
        for name, x in make((2, 9, 3, 46), torch.bfloat16, memory, kv_heads=2, rotary=20).items()
    }
    expected = rope(**inputs, **options)
    places = inputs["q"], inputs["k"]
    found = rope(**inputs, in_place=True, **options)
    for place, x, turned in zip(places, found, expected, strict=True):
        assert x is place and torch.equal(x, turned)


def test_in_place_is_refused_where_a_gradient_is_wanted():
    inputs = make((1, 3, 2, 8), torch.float32, kv_heads=1)
    with pytest.raises(ValueError, match="in_place=True would write into q"):
        rope(**inputs, in_place=True)
    inputs["q"] = inputs["q"].detach()
    with pytest.raises(ValueError, match="in_place=True would write into k"):
        rope(**inputs, in_place=True)
    with torch.no_grad():
        rope(**inputs, in_place=True)
    # Beside the public function, the operator itself refuses.
    with pytest.raises(NotImplementedError, match="writes into a tensor"):
        torch.ops.pypar.rope_in_place(
            make((1, 3, 2, 8), torch.float32)["q"], None, inputs["cos"], inputs["sin"], None, False, "native"
        )


def test_in_place_is_refused_where_elements_share_memory():
    inputs = make((1, 3, 1, 8), torch.float32)
    q = inputs["q"].detach().expand(1, 3, 5, 8)
    with pytest.raises(ValueError, match="in_place=True would turn elements of q several times"):
        rope(q, inputs["cos"], inputs["sin"], in_place=True)


@pytest.mark.parametrize("used", ["q", "k"])
def test_one_output_alone_has_the_gradient_of_that_output(used):
    inputs = make((2, 3, 2, 8), torch.float32, kv_heads=1)
    q, k = rope(**inputs)
    (q if used == "q" else k).square().sum().backward()
    # What a rotation keeps: the sum of squares, whose gradient is 2 x.
    torch.testing.assert_close(inputs[used].grad, 2 * inputs[used].detach())
    assert inputs["k" if used == "q" else "q"].grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)])
def test_empty(name, shape):
    inputs = make(shape, torch.float32)
    rope(**inputs, backend=name).sum().backward()
    assert inputs["q"].grad.shape == shape


def test_same_bits_for_any_number_of_threads():
    inputs = make((2, 111, 8, 64), torch.float32, kv_heads=2)
    assert_same_for_any_threads(lambda **inputs: rope(**inputs, backend="native"), inputs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_the_reference(interleaved):
    q, k = (torch.randn(2, 3, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    angles = torch.rand(3, 2, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda q, k: rope(q, angles.cos(), angles.sin(), k, interleaved=interleaved), (q, k)
    )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make((2, 3, 2, 8), torch.float32, "heads before positions", kv_heads=1, positions="B, T")
    tables = (inputs["cos"], inputs["sin"], inputs["positions"], True, name)
    torch.library.opcheck(torch.ops.pypar.rope_forward, (inputs["q"], inputs["k"], *tables))
    q, k = inputs["q"].detach(), inputs["k"].detach()
    torch.library.opcheck(torch.ops.pypar.rope_backward, (q, k, *tables))
    torch.library.opcheck(torch.ops.pypar.rope_in_place, (q, k, *tables))


def test_compiles_as_one_graph():
    inputs = make((2, 7, 3, 16), torch.float32, kv_heads=1)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(**inputs), rope(**inputs), strict=True):
        assert torch.equal(ours, expected)
    compiled(**inputs)[0].sum().backward()


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((zeros(3, 2, 8), zeros(3, 4), zeros(3, 4)), {}, "q .* must be .B, T, N, H."),
        ((zeros(1, 3, 2, 7), zeros(3, 4), zeros(3, 4)), {}, "cos .* a column for each pair"),
        ((zeros(1, 3, 2, 8), zeros(3, 8), zeros(3, 4)), {}, "cos .* take the first half"),
        ((zeros(1, 3, 2, 8), zeros(3, 4), zeros(4, 4)), {}, "sin .* must be .T, H/2."),
        ((zeros(1, 3, 2, 8), zeros(3, 4), zeros(3, 3)), {}, "sin .* must have the shape of cos"),
        ((zeros(1, 3, 2, 8), zeros(3, 4), zeros(3, 4).half()), {}, "sin is .* must be float32"),
        ((zeros(1, 3, 2, 8), zeros(3, 4), zeros(3, 4), zeros(1, 3, 1, 6)), {}, "k .* must have q's B, T, H"),
        ((zeros(1, 3, 2, 8), zeros(1, 3, 4), zeros(1, 3, 4)), {"positions": 0}, "cos .* must be .positions"),
        ((zeros(1, 3, 2, 8), zeros(9, 4), zeros(9, 4)), {"positions": 7}, "positions 7 to 9 .* have 9"),
        ((zeros(1, 3, 2, 8), zeros(9, 4), zeros(9, 4)), {"positions": -1}, "positions -1 to 1"),
        (
            (zeros(1, 3, 2, 8), zeros(9, 4), zeros(9, 4)),
            {"positions": zeros(3)},
            "positions .* and int64",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pypar.rope(*arguments, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("position", [-1, 9])
def test_positions_beyond_the_tables_are_refused(name, position):
    with pytest.raises(ValueError, match="cos and sin have 9 rows"):
        rope(
            zeros(1, 3, 2, 8),
            zeros(9, 4),
            zeros(9, 4),
            positions=torch.tensor([0, position, 1]),
            backend=name,
        )
