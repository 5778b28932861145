"""The planner's pure part: never over the budget, no better choice by brute force, no slower with a larger budget."""

import itertools
import math
import random
import time
from dataclasses import replace

import pytest

from pypar.recomputation.plan.choose import choose, least_bytes, peak_of
from pypar.recomputation.plan.costs import INPUT, OFFLOAD, OTHER, RECOMPUTE, SAVE, BlockCosts, Copying, Piece
from pypar.recomputation.plan.options import option, options


def random_block(draw: random.Random) -> BlockCosts:
    num_calls = draw.randint(1, 3)
    saved = draw.choice([0, 4, 8])
    pieces = [Piece(INPUT, saved, 0 if saved else 8, draw.choice([0, 8]))]
    for call in range(num_calls):
        if draw.random() < 0.8:
            saved, extra = draw.choice([(0, 8), (4, 0), (8, 4), (12, 4)])
            pieces.append(Piece("linear", saved, extra, draw.choice([0, saved + extra]), call, call + 1))
    if draw.random() < 0.5:
        pieces.append(Piece(OTHER, 4, 0, draw.choice([0, 4]), None, draw.randint(0, num_calls)))
    calls_s = tuple(float(draw.randint(1, 9)) for _ in range(num_calls))
    between_s = tuple(float(draw.randint(0, 2)) for _ in range(num_calls + 1))
    return BlockCosts(tuple(pieces), calls_s, between_s, 3.0, 6.0)


def every_choice(blocks, copying):
    """(peak, seconds) of all that can be chosen, with one microbatch in flight."""
    ways = []
    for block in blocks:
        choices = [p.choices(moves=copying.moves and not block.stays) for p in block.pieces]
        ways.append([option(block, each, copying) for each in itertools.product(*choices)])
    return [
        (peak_of(chosen), sum(each.added_s for each in chosen), chosen) for chosen in itertools.product(*ways)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_no_choice_is_better_within_any_budget(seed):
    draw = random.Random(seed)
    blocks = [random_block(draw) for _ in range(draw.randint(1, 3))]
    blocks[-1] = replace(blocks[-1], stays=True)
    copying = Copying(draw.choice([1.0, 8.0]), draw.choice([0.0, 1.0]))
    every = every_choice(blocks, copying)
    least = min(peak for peak, _, _ in every)
    assert least_bytes(blocks, copying) == least
    before = math.inf
    for budget in sorted({peak + extra for peak, _, _ in every for extra in (0, 3)}):
        chosen = choose(blocks, budget, copying)
        assert chosen.peak_bytes == peak_of(chosen.options) <= budget
        assert chosen.added_s == pytest.approx(min(s for peak, s, _ in every if peak <= budget))
        assert chosen.added_s <= before
        before = chosen.added_s
    assert choose(blocks, least - 1, copying) is None


def layer(scale=1):
    """One of a decoder's layers, in odd bytes."""
    sizes = {"rms_norm": 101, "linear": 303, "rope": 149, "attention": 113, "gated": 277}
    pieces = [Piece(INPUT, 100 * scale, 0, 100 * scale)]
    for call, (name, size) in enumerate([*sizes.items(), *sizes.items()]):
        pieces.append(Piece(name, size * scale, 7 * (call % 2), size * scale, call, call + 1))
    calls_s = tuple(0.001 * (1 + call % 5) for call in range(10))
    return BlockCosts(tuple(pieces), calls_s, (1e-5,) * 11, 0.03, 0.06)


def test_a_deep_model_is_planned_in_time_and_never_over():
    blocks = [layer(scale=1013)] * 39 + [replace(layer(scale=1013), stays=True)]
    copying = Copying(1e9, 0.0)
    saved = peak_of([options(block, Copying(moves=False))[0] for block in blocks])
    before, start = math.inf, time.process_time()
    for share in (0.1, 0.4, 1.01):
        chosen = choose(blocks, int(share * saved), copying)
        assert chosen.peak_bytes <= share * saved and chosen.added_s <= before
        before = chosen.added_s
    assert chosen.added_s == 0
    assert time.process_time() - start < 30  # it took 2 s


def test_what_choices_come_to():
    pieces = (
        Piece(INPUT, 0, 10, 10),
        Piece("linear", 8, 2, 10, 0, 1),
        Piece("attention", 6, 0, 0, 1, 2),
        Piece(OTHER, 4, 0, 4, None, 2),
    )
    block = BlockCosts(pieces, (1.0, 2.0, 4.0), (0.25, 0.5, 0.125, 0.0625), 1.0, 2.0)
    copying = Copying(1.0, 1.0)

    def come_to(*choices):
        found = option(block, choices, copying)
        return found.kept_bytes, found.moved_bytes, found.backward_bytes, found.added_s

    assert come_to(SAVE, SAVE, SAVE, SAVE) == (18, 0, 18, 0)  # nothing runs again, so that the input goes
    assert come_to(SAVE, RECOMPUTE, SAVE, SAVE) == (20, 0, 28, 1.25)  # attention runs no more
    assert come_to(SAVE, SAVE, RECOMPUTE, SAVE) == (24, 0, 30, 2.75)  # and the product is not computed again
    assert come_to(OFFLOAD, RECOMPUTE, RECOMPUTE, RECOMPUTE) == (0, 10, 28, 3.75 + 20)
    assert come_to(SAVE, OFFLOAD, SAVE, OFFLOAD) == (6, 12, 18, 24)
    hidden = Copying(4.0, 0.0)  # beside a forward of 1 s and a backward of 2 s
    assert option(block, (SAVE, OFFLOAD, SAVE, OFFLOAD), hidden).added_s == pytest.approx(2 + 1)
