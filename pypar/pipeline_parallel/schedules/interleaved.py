"""Interleaved 1F1B: several stages a rank, which take turns (Megatron-LM, Narayanan et al., arXiv 2104.04473)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.alternating import Item, alternating
from pypar.pipeline_parallel.schedules.registered import Option, Registered


def interleaved(num_ranks: int, num_microbatches: int, *, stages_per_rank: int) -> Schedule:
    """Stage s is on rank s % p of p ranks; with v stages a rank the idle time is 1/v of that of 1F1B.

    Microbatches pass in rounds of p, each round through all stages of the rank; the last round may have fewer.
    Rank 0 holds p(1 + (p-1)/(pv)) microbatches' worth of its layers, each further rank 2/v less.
    """
    lists = []
    for rank in range(num_ranks):
        forwards, backwards = rounds(rank, num_ranks, num_microbatches, stages_per_rank)
        warm_up = 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks
        lists.append(alternating(forwards, backwards, warm_up))
    return Schedule.of(lists).first(num_microbatches)


def rounds(
    rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> tuple[list[Item], list[Item]]:
    """The order of a rank's forwards and backwards, for microbatches filled up to whole rounds of `num_ranks`."""
    forwards, backwards = (
        [
            ((0, chunk * num_ranks + rank), first + i)
            for first in range(0, num_microbatches, num_ranks)
            for chunk in chunks
            for i in range(num_ranks)
        ]
        for chunks in (range(stages_per_rank), range(stages_per_rank)[::-1])
    )
    return forwards, backwards


STAGES_PER_RANK = Option("stages_per_rank", 2, "How many stages a rank holds.", smallest=1)

SCHEDULE = Registered(
    "interleaved",
    interleaved,
    "1F1B with several stages a rank: idle 1/stages_per_rank as long, with more messages and more memory.",
    (STAGES_PER_RANK,),
)
