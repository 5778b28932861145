"""DualPipe: two directions, and forwards beside backwards (DeepSeek-V3, arXiv 2412.19437)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.registered import Registered, check_even
from pypar.pipeline_parallel.schedules.row import Row


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Every rank holds stage r of path 0 and stage p-1-r of path 1; even microbatches go along path 0, odd ones 1.

    With O for a forward and a backward that run as one, and B for a whole backward, the idle time of p ranks is
    (p/2-1)(O+B-3W). Parameters are held twice, and at most p+1 microbatches a rank. With fewer than 2p microbatches
    there is more idle time. ValueError for an odd number of ranks.
    """
    check_even("dualpipe", num_ranks)
    half = num_ranks // 2
    filled = max(2 * num_ranks, num_microbatches + num_microbatches % 2)
    lists, pairs = [], set()
    for rank in range(num_ranks):
        down, up = (0, rank), (1, num_ranks - 1 - rank)
        inner = min(rank, num_ranks - 1 - rank)  # 0 at the ends, half - 1 in the middle
        row = Row((down, up) if rank < half else (up, down), step=2)
        fill(row, half, inner, filled // 2)
        lists.append(row.actions)
        pairs |= {(rank, position) for position in row.pairs}
    placement = {
        (path, s): s if path == 0 else num_ranks - 1 - s for path in (0, 1) for s in range(num_ranks)
    }
    return Schedule.of(lists, placement, pairs=pairs).first(num_microbatches)


def fill(row: Row, depth: int, inner: int, num_each: int) -> None:
    """The eight phases of a rank: `depth` ranks share a way down and up, of which this one is number `inner`.

    num_each: how many microbatches its stage 0 has, and its stage 1; 2 `depth` or more.
    """
    outer = depth - 1 - inner
    row.add("F0", 2 * outer)
    row.add("F0 F1", inner + 1)
    row.add("I1 W F1", outer)
    for i in range(num_each - 2 * depth + inner + 1):
        if i == 0 and outer == 0:
            row.add("F0 B1")  # running them one after the other lets the neighbours start earlier
        else:
            row.pair("F0 B1")
        row.pair("F1 B0")
    for _ in range(outer):
        row.add("B1")
        row.pair("F1 B0")
    late = False  # in the second half weight gradients wait until nothing waits for the rank
    for i in range(inner + 1):
        late = late or (i == (inner + 1) // 2 and inner % 2 == 1)
        row.add("I1" if late else "B1")
        late = late or (i == (inner + 1) // 2 and inner % 2 == 0)
        row.add("I0" if late else "B0")
    for _ in range(outer):
        row.add("W")
        row.add("I0" if late else "B0")
    row.add("W", inner + 1)


SCHEDULE = Registered(
    "dualpipe",
    dualpipe,
    "Two directions at once, a forward beside a backward; parameters twice, an even number of ranks.",
)
