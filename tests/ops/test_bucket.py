"""bucket, scaling and converting in one pass, on every backend of a CPU; Triton's: tests/gpu/test_row_kernels.py.

The long tests have every combination, the quick ones every pair.
"""

import itertools

import pytest
import torch

from pypar.ops import native
from pypar.ops.bucket import bucket, move, pack, unpack
from pypar.selftest.case import Draw
from pypar.selftest.cases.bucket import case, plain
from tests.harness.native_kernels import instruction_set
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = list(itertools.product(DTYPES, DTYPES))


def make(count, dtype):
    return case(count, dtype).inputs(Draw("cpu", dtype, seed=count))["src"]


@pytest.mark.parametrize(
    ("name", "pair", "count", "scale"),
    pairwise(NAMES, PAIRS, (0, 1, 63, 111, 1023, 70001), (1.0, 0.25, 1 / 3)),
)
def test_bits(name, pair, count, scale):
    source, target = pair
    src = make(count, source)
    out = torch.full((count,), 7.0, dtype=target)
    assert bucket(src, scale, out=out, backend=name) is out
    assert torch.equal(out, plain(src, scale, target))


@pytest.mark.parametrize("isa", native.module().supported_isas())
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_every_instruction_set(isa, source, target):
    src = make(1023, source)
    with instruction_set(isa):
        out = bucket(src, 1 / 3, out=torch.empty(1023, dtype=target), backend="native")
    assert torch.equal(out, plain(src, 1 / 3, target))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_large_and_missing_numbers(name, source, target):
    """What fp16 has no room for becomes infinite unless the scale comes first."""
    src = torch.tensor([torch.inf, -torch.inf, torch.nan, 60000.0, -60000.0, 0.0, -0.0]).to(source)
    for scale in (1.0, 4.0, 0.5):
        out = bucket(src, scale, out=torch.empty(7, dtype=target), backend=name)
        expected = plain(src, scale, target)
        assert torch.equal(out.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
        assert out[2].isnan() and out[6].signbit()


@pytest.mark.parametrize("name", NAMES)
def test_in_place_and_parts_of_a_buffer(name):
    x = make(1023, torch.float32)
    expected = torch.cat([x[:5], plain(x[5:1000], 0.1, torch.float32), x[1000:]])
    assert bucket(x[5:1000], 0.1, out=x[5:1000], backend=name).data_ptr() == x[5:].data_ptr()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(threads):
    src, before = make(200001, torch.float32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = bucket(src, 1 / 3, out=torch.empty(200001, dtype=torch.bfloat16), backend="native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, plain(src, 1 / 3, torch.bfloat16))


def test_float64_is_the_references():
    src = make(63, torch.float64)
    out = bucket(src, 1 / 3, out=torch.empty(63, dtype=torch.float64))
    assert torch.equal(out, src * (1 / 3))
    with pytest.raises(ValueError, match="refuses: float64 is not one of"):
        bucket(src, out=out, backend="native")
    with pytest.raises(ValueError, match="refuses: float64 is not one of"):
        bucket(src.float(), out=out, backend="native")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    src, out = make(63, torch.float32), torch.empty(63, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.pypar.bucket_forward, (src, 0.5, out, name))


@pytest.mark.parametrize(
    ("src", "out", "sentence"),
    [
        (torch.zeros(3), torch.zeros(4), r"out \(4,\) on cpu must have the shape and device of src \(3,\)"),
        (torch.zeros(3), torch.zeros(3, device="meta"), "on meta must have the shape and device"),
        (torch.zeros(6)[::2], torch.zeros(3), r"src \(strides \(2,\)\) .* must be contiguous"),
    ],
)
def test_bad_input_is_named(src, out, sentence):
    with pytest.raises(ValueError, match=sentence):
        bucket(src, out=out)


@pytest.mark.parametrize("isa", native.module().supported_isas())
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_large_copy_has_the_bits_of_the_source(isa, dtype):
    """Streamed in blocks from wherever source and target begin; nothing is written beside them."""
    for count, source_at, target_at in itertools.product([65_536, 200_003], [0, 3], [0, 5]):
        src = make(count + source_at, dtype)[source_at:]
        out = torch.full((count + 40,), 7.0, dtype=dtype)
        with instruction_set(isa):
            move(src, out[target_at : target_at + count])
        assert torch.equal(out[target_at : target_at + count], src)
        assert (out[:target_at] == 7).all() and (out[target_at + count :] == 7).all()


def test_a_copy_of_another_layout_is_a_copy():
    src = make(400 * 300, torch.float32).view(400, 300)
    out = torch.empty(300, 400, dtype=torch.float64).t()
    move(src, out)
    assert torch.equal(out, src.double())


@pytest.mark.parametrize(("source", "target"), [(torch.float32, torch.bfloat16), (torch.int64, torch.int64)])
def test_pieces_are_packed_one_after_the_other(source, target):
    """Scaled and rounded on the way where dtypes differ, and back; what lies behind them stays."""
    pieces = [
        torch.arange(6).view(2, 3).to(source),
        torch.empty(0, 3, dtype=source),
        torch.tensor(7).to(source),
    ]
    scale = 0.5 if source.is_floating_point else 1.0
    flat = torch.full((9,), 3, dtype=target)
    pack(pieces, flat, scale)
    assert torch.equal(flat, (torch.tensor([0, 1, 2, 3, 4, 5, 7, 3 / scale, 3 / scale]) * scale).to(target))
    back = [torch.empty_like(x) for x in pieces]
    unpack(flat, back, 1 / scale)
    assert all(torch.equal(x, y) for x, y in zip(back, pieces, strict=True))
