"""Chimera: two pipelines in opposite directions over the same ranks (Li and Hoefler, arXiv 2107.06925)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, Action, Message, Schedule
from pypar.pipeline_parallel.schedules.alternating import alternating
from pypar.pipeline_parallel.schedules.registered import Registered, check_even

TIMES = {FORWARD: 1, BACKWARD: 2}  # by which the two directions are merged


def chimera(num_ranks: int, num_microbatches: int) -> Schedule:
    """Every rank holds stage r of path 0 and stage p-1-r of path 1; even microbatches go along path 0, odd ones 1.

    Each direction alone is 1F1B; a rank takes from either list what can run first. Parameters are held twice, and
    p/2+1 to p microbatches. With p microbatches and B = 2 F the idle share is (p-2)/(3p/2+p-2). ValueError for an odd
    number of ranks.
    """
    check_even("chimera", num_ranks)
    counts = (num_microbatches + 1) // 2, num_microbatches // 2
    placement = {
        (path, s): s if path == 0 else num_ranks - 1 - s for path in (0, 1) for s in range(num_ranks)
    }
    waiting: list[list[list[Action]]] = []  # of each rank, of each path
    for rank in range(num_ranks):
        waiting.append([])
        for path, stage in ((0, rank), (1, num_ranks - 1 - rank)):
            own = [((path, stage), 2 * i + path) for i in range(counts[path])]
            waiting[-1].append(alternating(own, own, num_ranks - 1 - stage)[::-1])
    return _merged(Schedule.of([], placement), waiting)


def _merged(rules: Schedule, waiting: list[list[list[Action]]]) -> Schedule:
    """Lets every rank run, in whole units of time, the first action of its lists whose input has arrived."""
    lists: list[list[Action]] = [[] for _ in waiting]
    arrival: dict[Message | None, int] = {None: 0}
    free = [0] * len(waiting)
    now = 0
    while any(any(both) for both in waiting):
        for rank, both in enumerate(waiting):
            ready = [
                actions
                for actions in both
                if actions and arrival.get(rules.needed_by(actions[-1]), now + 1) <= now
            ]
            if ready and free[rank] <= now:
                action = min(ready, key=lambda actions: _urgency(rules, actions[-1])).pop()
                lists[rank].append(action)
                free[rank] = now + TIMES[action.kind]
                made = rules.sent_by(action)
                if made is not None:
                    arrival[made] = free[rank]
        now += 1
    return Schedule.of(lists, rules.placement)


def _urgency(rules: Schedule, action: Action) -> tuple[int, int, int]:
    """Smaller is first: the earlier microbatch, then the one that has the longer way to go."""
    is_backward = action.kind == BACKWARD
    stages_left = action.stage if is_backward else 2 * rules.num_stages - action.stage
    return action.microbatch // 2, -stages_left, action.path


SCHEDULE = Registered(
    "chimera",
    chimera,
    "Two directions of one_f_one_b at once: about half the idle time; parameters twice, an even number of ranks.",
)
