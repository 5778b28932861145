"""The formula of the bytes that sharded training sends, at its limits and in its orders."""

import pytest

from pypar.cost.memory import Parameter, Sharding, Units
from pypar.cost.volume import sent

PSI = 1 << 20
MODEL = Units([[Parameter((PSI // 4, 1))] for _ in range(4)])
HALF = Units([[Parameter((PSI // 4, 1), 2)] for _ in range(4)])


@pytest.mark.parametrize(
    ("stage", "reshard", "num_backwards", "expected"),
    [(0, True, 1, 2), (1, True, 5, 2), (2, True, 5, 2), (3, True, 1, 3), (3, True, 4, 9), (3, False, 4, 5)],
)
def test_passes_over_the_parameters(stage, reshard, num_backwards, expected):
    """How many times the parameters travel in a step."""
    for num_ranks in (1, 2, 4, 64):
        sharding = Sharding(stage, num_ranks, reshard=reshard)
        found = sent(MODEL, sharding, num_backwards=num_backwards).total
        assert found == expected * 4 * PSI * (num_ranks - 1) // num_ranks


def test_gathers_carry_what_the_model_computes_with():
    assert sent(HALF, Sharding(3, 2)).inside == {
        "reduce_scatter": 4 * PSI // 2,
        "all_gather": 2 * 2 * PSI // 2,
    }


def test_hybrid_sends_less_between_copies():
    found = sent(MODEL, Sharding(3, 8, shard_size=2))
    assert found.inside == sent(MODEL, Sharding(3, 2)).inside
    assert found.outside == {"all_reduce": 2 * 3 * (4 * PSI // 2) // 4}
    assert sent(MODEL, Sharding(3, 8)).outside == {"all_reduce": 0}


def test_uneven_parts_travel_without_padding():
    model = Units([[Parameter((7, 5)), Parameter(())]])
    assert sent(model, Sharding(1, 4)).inside == {"reduce_scatter": 3 * 36, "all_gather": 3 * 36}


def test_frozen_parameters_are_gathered_and_never_reduced():
    model = Units([[Parameter((8,), is_trained=False)]])
    assert sent(model, Sharding(2, 2)).total == 0
    assert sent(model, Sharding(3, 2)).inside == {"reduce_scatter": 0, "all_gather": 2 * 32 // 2}
