"""Formulas of the memory of sharded states against published tables, and against the cut itself."""

import math

import pytest
import torch

from pypar.cost.memory import ADAM, ZERO_PAPER, Parameter, Sharding, Units, peaks, states

# Table 1 of arXiv 1910.02054: GB a rank (1e9) by ranks, for 7.5 B, 128 B and 1 T parameters at stages 1, 2 and 3.
TABLE_1 = {
    1: ((120, 120, 120), (2048, 2048, 2048), (16000, 16000, 16000)),
    4: ((52.5, 41.3, 30), (896, 704, 512), (7000, 5500, 4000)),
    16: ((35.6, 21.6, 7.5), (608, 368, 128), (4750, 2875, 1000)),
    64: ((31.4, 16.6, 1.88), (536, 284, 32), (4187, 2218, 250)),
    256: ((30.4, 15.4, 0.47), (518, 263, 8), (4046, 2054, 62.5)),
    1024: ((30.1, 15.1, 0.12), (513, 257, 2), (4011, 2013, 15.6)),
}
SIZES = (7_500_000_000, 128_000_000_000, 1_000_000_000_000)


def gigabytes(num_parameters, stage, num_ranks):
    model = Units([[Parameter((num_parameters,), element_bytes=2)]])
    return sum(states(model, Sharding(stage, num_ranks), ZERO_PAPER).values()) / 1e9


@pytest.mark.parametrize("num_ranks", TABLE_1)
def test_table_1_of_the_zero_paper(num_ranks):
    for num_parameters, row in zip(SIZES, TABLE_1[num_ranks], strict=True):
        for stage, published in enumerate(row, start=1):
            last_digit = 10 ** -len(str(published).partition(".")[2])  # the paper rounds some down
            assert gigabytes(num_parameters, stage, num_ranks) == pytest.approx(published, abs=last_digit)


def test_figure_1_of_the_zero_paper():
    """120, 31.4, 16.6 and 1.9 GB of 7.5 B parameters over 64 ranks."""
    assert [round(gigabytes(SIZES[0], stage, 64), 1) for stage in range(4)] == [120, 31.4, 16.6, 1.9]


SHAPES = ((7, 5), (1, 5), (0, 5), (3, 2, 5), (5,), (1,), ())


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_rows_are_those_of_tensor_split(num_ranks):
    for shape in SHAPES:
        parameter = Parameter(shape)
        owned = [Sharding(3, num_ranks, rank=rank).own(parameter) for rank in range(num_ranks)]
        expected = [x.numel() for x in torch.empty(shape).tensor_split(num_ranks)] if shape else None
        assert owned == (expected or [1] + [0] * (num_ranks - 1))
        assert sum(owned) == parameter.numel == math.prod(shape)


def test_hybrid_cuts_over_some_ranks():
    parameter = Parameter((7, 5))
    owned = [Sharding(3, 4, shard_size=2, rank=rank).own(parameter) for rank in range(4)]
    assert owned == [20, 15, 20, 15]


@pytest.mark.parametrize(
    ("element_bytes", "expected"),
    [(2, (18, 12, 10, 9)), (4, (16, 12, 10, 8))],
)
def test_bytes_of_a_parameter_over_two_ranks(element_bytes, expected):
    model = Units([[Parameter((64,), element_bytes)]])
    for stage, each in enumerate(expected):
        assert sum(states(model, Sharding(stage, 2), ADAM).values()) == 64 * each


def test_frozen_parameters_have_neither_gradients_nor_moments():
    model = Units([[Parameter((8, 3), 2, is_trained=False)]])
    for stage, held in ((0, 48), (2, 48), (3, 24)):
        found = states(model, Sharding(stage, 2))
        assert found == {"parameters": held, "masters": 0, "gradients": 0, "moments": 0}


def test_what_comes_and_goes():
    units = [[Parameter((n,))] for n in (10, 30, 20, 40)]
    model = Units(units, before=[Parameter((3,))], after=[Parameter((5,))])
    rows = states(model, Sharding(3, 1))["gradients"]
    assert peaks(model, Sharding(3, 1))["gathered"] == 4 * (8 + 60)
    assert peaks(model, Sharding(3, 1), num_ahead=0)["gathered"] == 4 * (8 + 40)
    assert peaks(model, Sharding(3, 1, reshard=False))["gathered"] == 4 * 108
    assert peaks(model, Sharding(2, 1))["gathered"] == 0
    assert peaks(model, Sharding(3, 1))["gradients"] == rows + 4 * (5 + 60)
    assert peaks(model, Sharding(2, 1), num_backwards=2)["gradients"] == rows + 4 * 108
    late = Units(units, before=[Parameter((90,))])
    assert peaks(late, Sharding(2, 1))["gradients"] == 4 * (190 + 90 + 10)
    assert peaks(Units([]), Sharding(3, 2)) == dict.fromkeys(
        ("parameters", "masters", "gradients", "moments", "gathered"), 0
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stage": 4}, "stage (4) must be 0, 1, 2 or 3"),
        ({"num_ranks": 4, "shard_size": 3}, "shard_size (3) must divide num_ranks (4)"),
        ({"num_ranks": 2, "rank": 2}, "rank (2) must be one of num_ranks (2)"),
    ],
)
def test_what_is_no_sharding_is_refused(options, sentence):
    with pytest.raises(ValueError) as refused:
        Sharding(**options)
    assert sentence in str(refused.value)
