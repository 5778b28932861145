"""ZB-H1: weight gradients fill a part of the idle time, in the memory of 1F1B (Qi et al., arXiv 2401.10241)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.alternating import alternating
from pypar.pipeline_parallel.schedules.interleaved import in_rounds, rounds
from pypar.pipeline_parallel.schedules.registered import Option, Registered


def h1(num_ranks: int, num_microbatches: int, *, stages_per_rank: int) -> Schedule:
    """Rank r is always r weight gradients late, so its input gradients leave early.

    With one stage a rank, p ranks and the times F, I, W of a microbatch, a step is idle for (p-1)(F+I-W); every rank
    holds at most p microbatches. With v stages a rank (stage s on rank s % p) the idle time is 1/v of that.
    """
    sizes = rounds(num_ranks, num_microbatches)
    lists = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        warm_up = num_ranks - 1 - rank + (stages_per_rank - 1) * sizes[0]
        lists.append(alternating(in_rounds(stages, sizes), in_rounds(stages[::-1], sizes), warm_up, lag=rank))
    return Schedule.of(lists)


SCHEDULE = Registered(
    "zb_h1",
    h1,
    "Backward in two parts, late weight gradients: idle (p-1)(F+I-W) in the memory of one_f_one_b's first rank.",
    (Option("stages_per_rank", 1, "How many stages a rank holds.", smallest=1),),
)
