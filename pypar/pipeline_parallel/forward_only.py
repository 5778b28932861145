"""The schedule of an evaluation: forwards alone, through the stages of a schedule that trains."""

from __future__ import annotations

from pypar.pipeline_parallel.action import FORWARD, Action, Schedule


def forwards_of(schedule: Schedule, num_microbatches: int) -> Schedule:
    """The forward-only schedule for the stages of the first path, which lie as in `schedule`.

    Microbatches pass in groups of num_ranks, each group through all stages: with one stage a rank that is
    the plain order, with several the ranks take turns. Every action comes after what it needs in one order
    of all actions, so it cannot deadlock.
    """
    placement = {place: rank for place, rank in schedule.placement.items() if place[0] == 0}
    order = sorted(
        (microbatch // schedule.num_ranks, stage, microbatch)
        for _, stage in placement
        for microbatch in range(num_microbatches)
    )
    actions = [Action(FORWARD, stage, microbatch) for _, stage, microbatch in order]
    lists = [[a for a in actions if placement[a.place] == rank] for rank in range(schedule.num_ranks)]
    return Schedule.of(lists, placement)
