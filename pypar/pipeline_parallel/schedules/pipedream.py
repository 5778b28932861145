"""PipeDream: no end of a batch to wait for, weights that are kept (Narayanan et al., SOSP 2019; arXiv 1806.03377)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import BACKWARD, UPDATE, Action, Schedule
from pypar.pipeline_parallel.schedules.one_f_one_b import one_f_one_b
from pypar.pipeline_parallel.schedules.registered import Registered


def pipedream(num_ranks: int, num_microbatches: int) -> Schedule:
    """The order of 1F1B with an update after every backward, so every microbatch is a batch of its own.

    The forward of stage s of p takes the newest weights, which are p-1-s updates behind, and the backward of the same
    microbatch takes the same ones: p-s versions are kept.
    """
    schedule = one_f_one_b(num_ranks, num_microbatches)
    return with_updates(schedule, 1, {(0, stage): num_ranks - 1 - stage for stage in range(num_ranks)})


def with_updates(schedule: Schedule, batch: int, delays: dict[tuple[int, int], int]) -> Schedule:
    """The lists with an update behind the last backward of each `batch` microbatches, and of the last ones."""
    last = schedule.num_microbatches - 1
    lists: list[list[Action]] = []
    for actions in schedule.lists:
        lists.append([])
        for action in actions:
            lists[-1].append(action)
            number = action.microbatch
            if action.kind == BACKWARD and (number == last or number % batch == batch - 1):
                lists[-1].append(action._replace(kind=UPDATE))
    return Schedule.of(lists, schedule.placement, delays=delays)


SCHEDULE = Registered(
    "pipedream",
    pipedream,
    "Asynchronous: an update after every backward, and weights kept as old as the microbatches in flight.",
)
