"""Products of parameters of which `make test` takes as many as show every pair of values, and `make test-all` the rest.

A fault that needs three values at once is rare beside one that a value or two bring out, and the number of pairs grows
with the two longest axes alone (Cohen, Dalal, Fredman and Patton, "The AETG system", 1997).
"""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(*of_axes: Iterable) -> list[Any]:
    """Every combination of one value of each of three or more axes, as parametrize takes them, in the product's order.

    Those that are marked `slow` bring no pair of values of two axes that the others do not have.
    """
    axes = [tuple(axis) for axis in of_axes]
    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = {pair for combination in combinations for pair in _pairs(combination)}
    taken = set()
    for least in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for combination in combinations:
            new = missing & _pairs(combination)
            if len(new) >= least:
                missing -= new
                taken.add(combination)
    return [
        pytest.param(
            *(values := [axis[i] for axis, i in zip(axes, combination, strict=True)]),
            id="-".join(map(str, values)),
            marks=() if combination in taken else pytest.mark.slow,
        )
        for combination in combinations
    ]


def _pairs(combination: tuple[int, ...]) -> set[tuple]:
    return set(itertools.combinations(enumerate(combination), 2))
