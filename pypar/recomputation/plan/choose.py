"""The plan of one microbatch: one of its options for each block, the least seconds within a budget of bytes.

Blocks run one after the other and backward in the reverse order. When the backward of a block begins, the device holds
what the blocks before it keep, what of the one before was moved and comes back meanwhile, and all that this one needs.
The choice is a dynamic programme over bytes, exact where the sizes have a common divisor that is not too small beside
them all (for 8 blocks a 32768th, for 64 a 4096th), else with sizes rounded up to that: what it finds is never over the
budget, and a larger one never takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pypar.recomputation.plan.costs import BlockCosts, Copying
from pypar.recomputation.plan.options import Option, options

_MOST_STEPS = 1 << 18  # of the programme: blocks times units
_MOST_UNITS = 1 << 15


@dataclass(frozen=True)
class Chosen:
    """An option for each block; the most bytes at once, by the sum of the blocks', and the seconds that it adds."""

    options: tuple[Option, ...]
    peak_bytes: int
    added_s: float


def choose(blocks: Sequence[BlockCosts], budget_bytes: int, copying: Copying) -> Chosen | None:
    """The choice for the blocks, in the order of a forward, of the least seconds whose peak is within the budget.

    None: no choice is; `least_bytes` tells the smallest budget for which one is.
    """
    ways = _ways(blocks, copying)
    unit = _unit(ways)
    found = _programme(ways, unit, budget_bytes // unit)
    if found is None:
        return None
    return Chosen(tuple(found), peak_of(found), sum(each.added_s for each in found))


def least_bytes(blocks: Sequence[BlockCosts], copying: Copying) -> int:
    """The smallest budget for which `choose` finds a choice, in units of its programme."""
    ways = _ways(blocks, copying)
    unit = _unit(ways)
    below, enough = -1, 1
    while _programme(ways, unit, enough) is None:
        below, enough = enough, 2 * enough
    while enough - below > 1:
        middle = (below + enough) // 2
        if _programme(ways, unit, middle) is None:
            below = middle
        else:
            enough = middle
    return enough * unit


def peak_of(chosen: Sequence[Option]) -> int:
    """The most bytes at once of one option for each block."""
    most = before = arriving = 0
    for each in chosen:
        most = max(most, before + arriving + each.backward_bytes)
        before, arriving = before + each.kept_bytes, each.moved_bytes
    return most


def _ways(blocks: Sequence[BlockCosts], copying: Copying) -> Sequence[Sequence[Option]]:
    """The options of each block."""
    staying = replace(copying, moves=False)
    return [options(block, staying if block.stays else copying) for block in blocks]


def _unit(ways: Sequence[Sequence[Option]]) -> int:
    """Bytes of a step of the programme."""
    sizes = {
        n for way in ways for each in way for n in (each.kept_bytes, each.moved_bytes, each.backward_bytes)
    }
    largest = sum(max(each.kept_bytes for each in way) for way in ways) + max(sizes, default=0)
    return max(math.gcd(*sizes) or 1, -(-largest // min(_MOST_UNITS, max(1, _MOST_STEPS // len(ways)))))


def _units(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit)


@dataclass
class _Stage:
    """The programme after some blocks: seconds by what the last of them moved, and by units that all of them keep.

    source: for each entry the option of the last block, and what the block before it moved.
    """

    seconds: dict[int, Tensor]
    source: dict[int, tuple[Tensor, Tensor]]


def _programme(ways: Sequence[Sequence[Option]], unit: int, within: int) -> list[Option] | None:
    """The options of the least seconds of which no moment has more than `within` units."""
    if within < 0:
        return None
    size = min(within, sum(max(_units(each.kept_bytes, unit) for each in way) for way in ways)) + 1
    row = torch.full((size,), math.inf, dtype=torch.float64)
    row[0] = 0.0
    stages = [_Stage({0: row}, {})]
    for way in ways:
        stages.append(_next(stages[-1], way, unit, within))
        if not stages[-1].seconds:
            return None
    return _path(ways, unit, stages)


def _next(stage: _Stage, way: Sequence[Option], unit: int, within: int) -> _Stage:
    """One more block."""
    found = _Stage({}, {})
    for needed in {_units(each.backward_bytes, unit) for each in way}:
        before, moved_before = _before(stage.seconds, within - needed)
        if before is None or moved_before is None:
            continue
        for index, each in enumerate(way):
            kept, moved = _units(each.kept_bytes, unit), _units(each.moved_bytes, unit)
            count = len(before) - kept
            if _units(each.backward_bytes, unit) != needed or count <= 0:
                continue
            if moved not in found.seconds:
                found.seconds[moved] = torch.full_like(before, math.inf)
                found.source[moved] = (
                    torch.zeros(len(before), dtype=torch.int64),
                    torch.zeros_like(moved_before),
                )
            there, new = found.seconds[moved][kept:], before[:count] + each.added_s
            is_less = new < there
            chosen, came = found.source[moved]
            there[is_less] = new[is_less]
            chosen[kept:][is_less] = index
            came[kept:][is_less] = moved_before[:count][is_less]
    return _Stage(_useful(found.seconds), found.source)


def _before(rows: dict[int, Tensor], room: int) -> tuple[Tensor | None, Tensor | None]:
    """The least seconds by what is kept, where that and what comes back are within the room; and what comes back."""
    best: Tensor | None = None
    source: Tensor | None = None
    for moved, row in rows.items():
        if room - moved < 0:
            continue
        fits = row.clone()
        fits[room - moved + 1 :] = math.inf
        if best is None or source is None:
            best, source = fits, torch.full((len(row),), moved, dtype=torch.int64)
        else:
            is_less = fits < best
            best[is_less], source[is_less] = fits[is_less], moved
    return best, source


def _useful(rows: dict[int, Tensor]) -> dict[int, Tensor]:
    """Without what costs as much as with less moved."""
    found: dict[int, Tensor] = {}
    best: Tensor | None = None
    for moved in sorted(rows):
        row = rows[moved] if best is None else rows[moved].masked_fill(rows[moved] >= best, math.inf)
        best = row if best is None else torch.minimum(best, row)
        if bool((row < math.inf).any()):
            found[moved] = row
    return found


def _path(ways: Sequence[Sequence[Option]], unit: int, stages: Sequence[_Stage]) -> list[Option] | None:
    """From the best end back to the start."""
    ends = stages[-1].seconds.items()
    seconds, kept, moved = min((float(row.min()), int(row.argmin()), moved) for moved, row in ends)
    if not math.isfinite(seconds):
        return None
    found = []
    for way, stage in zip(reversed(ways), reversed(stages), strict=False):
        chosen, came = stage.source[moved]
        index, before = int(chosen[kept]), int(came[kept])
        found.append(way[index])
        kept, moved = kept - _units(way[index].kept_bytes, unit), before
    return found[::-1]
