"""pairs.py leaves out of the quick tests what shows no pair of values that others do not show."""

import itertools

from tests.harness.pairs import pairwise

AXES = (("a", "b", "c"), (1, 2), (True, False), ((1, 2), (3, 4), (5, 6)))


def quick(*axes):
    return [found.values for found in pairwise(*axes) if not found.marks]


def test_every_pair_is_quick_and_every_combination_is_there():
    assert [found.values for found in pairwise(*AXES)] == list(itertools.product(*AXES))
    assert {mark.name for found in pairwise(*AXES) for mark in found.marks} == {"slow"}
    for i, j in itertools.combinations(range(len(AXES)), 2):
        shown = {(values[i], values[j]) for values in quick(*AXES)}
        assert shown == set(itertools.product(AXES[i], AXES[j]))
    assert len(quick(*AXES)) <= 12  # nine pairs of the longest axes, and hardly more
