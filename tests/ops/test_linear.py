"""linear on every backend, and which library each processor takes.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch

from pypar.ops.backend import choose
from pypar.ops.linear import (
    BACKENDS,
    linear,
    linear_forward,
    linear_input_gradient,
    linear_weight_gradient,
    upcast,
)
from pypar.ops.linear.choice import Processor, backends_for, half_choice, library_choice, processor
from pypar.ops.linear.upcast import HALVES
from pypar.selftest.cases.linear import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.pairs import pairwise

NAMES = [backend.name for backend in BACKENDS]
IN_FP32 = [name for name in NAMES if name != "upcast"]
DTYPES = {"upcast": torch.bfloat16}
AMD = Processor("AuthenticAMD", has_avx512=True)
OLDER_AMD = Processor("AuthenticAMD", has_avx512=False)
INTEL = Processor("GenuineIntel", has_avx512=True)
X86 = library_choice(AMD)[0] == "onednn"


def available(name):
    if name == "onednn" and not X86:
        pytest.skip(library_choice(AMD)[1])
    return name


def make(rows, size, outputs, dtype=torch.float32, strided=False, bias=True):
    return draw_inputs(case(rows, size, outputs, strided=strided, bias=bias), dtype)


@pytest.mark.parametrize(
    ("bias", "strided", "sizes", "name"),
    pairwise(
        [False, True],
        [False, True],
        [
            ((63,), 17, 31),
            ((2, 63), 111, 63),
            ((1023,), 63, 23),
            ((), 111, 63),
            ((1,), 63, 111),
            ((2100,), 16, 40),
        ],
        IN_FP32,
    ),
)
def test_accuracy(name, sizes, strided, bias):
    check_case(case(*sizes, strided=strided, bias=bias), torch.float32, available(name))


@pytest.mark.parametrize(
    ("dtype", "bias", "strided", "sizes"),
    pairwise(
        HALVES,
        [False, True],
        [False, True],
        [((63,), 17, 31), ((2, 63), 111, 63), ((1023,), 63, 23), ((8,), 16, 2100), ((2100,), 16, 40)],
    ),
)
def test_accuracy_in_16_bits(dtype, sizes, strided, bias):
    check_case(case(*sizes, strided=strided, bias=bias), dtype, "upcast")


def test_copies_in_fp32_are_small(monkeypatch):
    """However few numbers are converted at once, the products are the same."""
    inputs = make((63,), 31, 47, torch.bfloat16)
    whole = linear(**inputs, backend="upcast")
    monkeypatch.setattr(upcast, "_COPY_BYTES", 4 * 31 * 16)
    torch.testing.assert_close(linear(**inputs, backend="upcast"), whole, rtol=2**-7, atol=0)


def test_other_dtypes_are_torch():
    inputs = make((7,), 31, 23, torch.float64)
    assert torch.equal(linear(**inputs), torch.nn.functional.linear(**inputs))
    with pytest.raises(ValueError, match="only float32|without oneDNN|x86"):
        linear(**inputs, backend="onednn")
    with pytest.raises(ValueError, match="only bfloat16 and float16"):
        linear(**inputs, backend="upcast")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bits_by_name(dtype):
    inputs = make((7,), 31, 23, dtype)
    assert torch.equal(linear(**inputs, backend="torch"), torch.nn.functional.linear(**inputs))
    for name, why in (("onednn", "only float32|without oneDNN|x86"), ("upcast", "below 8 rows")):
        with pytest.raises(ValueError, match=why):
            linear(**inputs, backend=name)


@pytest.mark.parametrize("name", IN_FP32)
@pytest.mark.parametrize("rows", [(7,), (2, 3), ()])
def test_the_pieces_are_the_gradients(name, rows):
    inputs = make(rows, 31, 23, bias=False)
    out = linear(**inputs, backend=available(name))
    dout = torch.randn(out.shape)
    out.backward(dout)
    x, weight = (t.detach() for t in inputs.values())
    assert torch.equal(linear_forward(x, weight, backend=name), out)
    dx = linear_input_gradient(dout, weight, backend=name)
    dweight = linear_weight_gradient(dout, x, backend=name)
    assert dx.shape == x.shape and torch.allclose(dx, inputs["x"].grad, rtol=1e-5, atol=1e-5)
    assert dweight.shape == weight.shape and torch.allclose(
        dweight, inputs["weight"].grad, rtol=1e-5, atol=1e-5
    )


def test_only_wanted_gradients_are_computed():
    inputs = make((7,), 31, 23)
    inputs["weight"].requires_grad_(False)
    linear(**inputs, backend=available("onednn")).sum().backward()
    assert inputs["weight"].grad is None and inputs["x"].grad is not None and inputs["bias"].grad is not None


@pytest.mark.parametrize(
    ("rows", "size", "outputs"), [((0,), 8, 3), ((2, 0), 8, 3), ((3,), 0, 4), ((3,), 8, 0)]
)
def test_empty(rows, size, outputs):
    inputs = make(rows, size, outputs)
    out = linear(**inputs)
    out.sum().backward()
    assert out.shape == (*rows, outputs) and inputs["weight"].grad.shape == (outputs, size)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_from_run_to_run(name):
    inputs = make((111,), 63, 31, DTYPES.get(name, torch.float32))
    first = linear(**inputs, backend=available(name))
    assert torch.equal(first, linear(**inputs, backend=name))


def test_opcheck():
    for name in NAMES:
        inputs = make((9,), 17, 19, DTYPES.get(name, torch.float32))
        torch.library.opcheck(torch.ops.pypar.linear_forward, (*inputs.values(), available(name)))


def test_compiles_as_one_graph():
    for name in NAMES:
        inputs = make((9,), 63, 31, DTYPES.get(name, torch.float32))
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**inputs, backend=available(name)), linear(**inputs, backend=name))


@pytest.mark.skipif(not X86, reason="oneDNN is for x86-64")
def test_the_library_follows_the_processor():
    def chosen(processor, backend=None, dtype=torch.float32, in_features=63):
        args = {"x": torch.zeros(9, in_features, dtype=dtype), "in_features": in_features, "out_features": 31}
        return choose("linear", backends_for(processor, dtype), args, backend).name

    assert chosen(AMD) == "onednn"
    assert chosen(OLDER_AMD) == chosen(INTEL) == "torch"
    assert chosen(INTEL, backend="onednn") == "onednn"
    assert chosen(AMD, dtype=torch.float64) == "torch"
    for dtype in HALVES:
        assert chosen(AMD, dtype=dtype) == half_choice(dtype)[0]
        assert chosen(INTEL, "upcast", dtype) == "upcast"
    assert chosen(AMD, in_features=7) == "torch"
    assert "vendor GenuineIntel, with AVX-512" in library_choice(INTEL)[1]
    assert "vendor AuthenticAMD, without AVX-512" in library_choice(OLDER_AMD)[1]
    assert processor().vendor


def test_bad_input_is_named():
    x, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="x .* must have weight"):
        linear(torch.zeros(3, 5), weight)
    with pytest.raises(ValueError, match="x .* must have weight"):
        linear(x.half(), weight)
    with pytest.raises(ValueError, match="bias .* must be .O."):
        linear(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="dout .* must have weight"):
        linear_input_gradient(x, weight)
    with pytest.raises(ValueError, match="dout .* and x .* must have the same"):
        linear_weight_gradient(torch.zeros(2, 5), x)
