"""Breadth-first: several stages a rank, and all microbatches through one before the next (Lamy-Poirier, arXiv
2211.05953).
"""

from __future__ import annotations

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, Action, Schedule
from pypar.pipeline_parallel.schedules.interleaved import STAGES_PER_RANK
from pypar.pipeline_parallel.schedules.registered import Registered


def breadth_first(num_ranks: int, num_microbatches: int, *, stages_per_rank: int) -> Schedule:
    """Stage s is on rank s % p of p ranks; idle as long as `interleaved`, and every rank holds all microbatches.

    What belongs to one stage (gathering its parameters, reducing its gradients) is needed in one stretch.
    """
    lists = []
    for rank in range(num_ranks):
        own = range(rank, num_ranks * stages_per_rank, num_ranks)
        actions = [Action(FORWARD, stage, i) for stage in own for i in range(num_microbatches)]
        actions += [Action(BACKWARD, stage, i) for stage in reversed(own) for i in range(num_microbatches)]
        lists.append(actions)
    return Schedule.of(lists)


SCHEDULE = Registered(
    "breadth_first",
    breadth_first,
    "All microbatches through one stage of a rank, then through its next; few gathers, all activations held.",
    (STAGES_PER_RANK,),
)
