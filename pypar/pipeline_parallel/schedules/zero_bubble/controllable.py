"""V-Half and V-Min: a half and a third of the memory of 1F1B (Qi et al., arXiv 2405.15362).

A building block says at which slots a microbatch is worked on, counted from its begin; the next microbatch begins
`PERIOD` slots later, and no two of them meet. Two stages a rank in a V, every piece of work one slot. The warm-up and
the end of such a table have idle slots, which two passes fill without holding more at any slot.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from pypar.pipeline_parallel.action import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Schedule
from pypar.pipeline_parallel.schedules.registered import Registered
from pypar.pipeline_parallel.schedules.zero_bubble.v import v_places

PERIOD = 6  # two stages with a forward, an input gradient and a weight gradient each
DOWN, UP, UP_BACK, DOWN_BACK = range(4)  # the way of a microbatch through the two stages of a rank
WEIGHT = 4  # weight gradients of both stages

Slots = list[list[int]]  # of one rank: for each of the ways, the slot of every microbatch
Block = Callable[[int, int], list[int]]  # of (rank, num_ranks): the slot of each of the four ways


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Every rank of p holds at most (p+2)/2 microbatches of its layers, rounded down."""

    def block(rank: int, p: int) -> list[int]:
        late = 0 if p % 2 else 3
        return [2 * rank, 3 * p - rank - 2, 3 * p + late + 2 * rank - 1, 6 * p + late - rank - 2]

    return _repeated(block, num_ranks, num_microbatches)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """Every rank of p holds at most (p+4)/3 microbatches of its layers, rounded down.

    Where F, I and W differ, ranks wait for each other in every period: with 10, 12 and 6 longer than under 1F1B.
    """

    def block(rank: int, p: int) -> list[int]:
        late = 0 if p % 3 else 2
        return [rank, 2 * p - rank - 1, 2 * p + late + rank, 4 * p + late - rank - 1]

    return _repeated(block, num_ranks, num_microbatches)


def _repeated(block: Block, num_ranks: int, num_microbatches: int) -> Schedule:
    tables = [
        [[first + PERIOD * i for i in range(num_microbatches)] for first in block(rank, num_ranks)]
        for rank in range(num_ranks)
    ]
    tables = _early([[*table, sum(_weights(table), [])] for table in tables], with_weights=True)
    tables = _early([table[:WEIGHT] for table in tables], with_weights=False)
    return Schedule.of(_list(table[:WEIGHT], v_places(rank, num_ranks)) for rank, table in enumerate(tables))


def _list(table: Slots, places: tuple[tuple[int, int], tuple[int, int]]) -> list[Action]:
    down, up = places
    columns = zip(
        [FORWARD, FORWARD, INPUT_GRADIENT, INPUT_GRADIENT, WEIGHT_GRADIENT, WEIGHT_GRADIENT],
        [down, up, up, down, up, down],
        [*table, *_weights(table, apart=True)],
        strict=True,
    )
    dated = [
        (slot, Action(kind, stage, i, path))
        for kind, (path, stage), slots in columns
        for i, slot in enumerate(slots)
    ]
    return [action for _, action in sorted(dated)]


def _weights(table: Slots, *, apart: bool = False) -> Slots:
    """The slots of weight gradients: the idle ones after input gradients, and then behind the end.

    apart: those of the upper stage and those of the lower one, the upper first where both wait; else one list.
    """
    taken = {slot: way for way, slots in enumerate(table) for slot in slots}
    found: Slots = [[], []]
    waiting = [0, 0]
    end = max(taken)
    slot = 0
    while slot <= end or any(waiting):
        way = taken.get(slot)
        if way is None:
            which = 0 if waiting[0] else 1
            if waiting[which]:
                waiting[which] -= 1
                found[which].append(slot)
        elif way in (UP_BACK, DOWN_BACK):
            waiting[way - UP_BACK if apart else 0] += 1
        slot += 1
    return found if apart else found[:1]


def _held(table: Slots) -> list[int]:
    """How many microbatches' stages are held after each slot; weight gradients that the table lacks fill it up."""
    weights = table[WEIGHT] if len(table) > WEIGHT else _weights(table)[0]
    change = [0] * (1 + max(weights[-1], *(slots[-1] for slots in table)))
    for slots, by in ((table[DOWN], 1), (table[UP], 1), (weights, -1)):
        for slot in slots:
            change[slot] += by
    return list(accumulate(change))


def _early(tables: list[Slots], *, with_weights: bool) -> list[Slots]:
    """Moves work of the warm-up and of the end to earlier idle slots, in the order of slots, without holding more.

    The warm-up ends with the first microbatch, and the end begins where the last one has begun. Without weight
    gradients in the tables, only the end is moved.
    """
    limit = max(max(_held(table)) for table in tables)
    work = sorted(
        (slot, rank, way, i)
        for rank, table in enumerate(tables)
        for way, slots in enumerate(table)
        for i, slot in enumerate(slots)
    )
    last = len(tables[0][DOWN]) - 1
    taken: list[set[int]] = [set() for _ in tables]
    phase = 0  # warm-up, middle, end
    for _, rank, way, i in work:
        if phase == 0 and way == DOWN_BACK and rank == 0:
            phase = 1
        stays = phase == 1 or (phase == 0 and not with_weights)
        if phase == 1 and way == DOWN and i == last:
            phase = 2
        if not stays:
            _move(tables, taken[rank], (rank, way, i), limit)
        taken[rank].add(tables[rank][way][i])
    if not with_weights:
        tables = [[*table, *_weights(table)] for table in tables]
    return _squeezed(tables)


def _move(tables: list[Slots], taken: set[int], work: tuple[int, int, int], limit: int) -> None:
    """Moves one piece of work to the first slot that is free, late enough, and holds no more than `limit`."""
    rank, way, i = work
    table = tables[rank]
    before = table[way][i]
    for slot in range(1 + _latest_need(tables, work), before):
        if slot not in taken:
            table[way][i] = slot
            # Only an earlier forward holds more, or one that takes a slot from a weight gradient.
            if way in (UP_BACK, DOWN_BACK, WEIGHT) and len(table) > WEIGHT:
                return
            if max(_held(table)) <= limit:
                return
    table[way][i] = before


def _latest_need(tables: list[Slots], work: tuple[int, int, int]) -> int:
    rank, way, i = work
    table = tables[rank]
    needs = [-1]
    giver = rank - 1 if way in (DOWN, UP_BACK) else rank + 1
    if way != WEIGHT and 0 <= giver < len(tables):
        needs.append(tables[giver][way][i])
    if way in (UP, UP_BACK, DOWN_BACK):
        needs.append(table[way - 1][i])
    if way == WEIGHT:
        needs.append(sorted(table[UP_BACK] + table[DOWN_BACK])[i])
    if i > 0:
        needs.append(table[way][i - 1])
    return max(needs)


def _squeezed(tables: list[Slots]) -> list[Slots]:
    """The order of every rank in the earliest slots that it can have."""
    work = sorted(
        (slot, rank, way, i)
        for rank, table in enumerate(tables)
        for way, slots in enumerate(table)
        for i, slot in enumerate(slots)
    )
    earliest = [[[0] * len(slots) for slots in table] for table in tables]
    free = [0] * len(tables)
    for _, rank, way, i in work:
        need = -1 if way == WEIGHT else _latest_need(earliest, (rank, way, i))
        earliest[rank][way][i] = max(free[rank], need + 1)
        free[rank] = earliest[rank][way][i] + 1
    return earliest


V_HALF = Registered(
    "v_half",
    v_half,
    "Two stages a rank in a V; half the memory of one_f_one_b, half to all of its idle time.",
)
V_MIN = Registered(
    "v_min",
    v_min,
    "Two stages a rank in a V; a third of one_f_one_b's memory, but slower than it where F, I and W differ.",
)
