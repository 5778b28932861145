"""Interleaved 1F1B: several stages a rank, which take turns (Megatron-LM, Narayanan et al., arXiv 2104.04473)."""

from __future__ import annotations

from collections.abc import Sequence

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.alternating import Item, alternating
from pypar.pipeline_parallel.schedules.registered import Option, Registered


def interleaved(num_ranks: int, num_microbatches: int, *, stages_per_rank: int) -> Schedule:
    """Stage s is on rank s % p of p ranks; with v stages a rank the idle time is 1/v of that of 1F1B.

    Microbatches pass in rounds of p, each round through all stages of the rank. Where their number is no multiple of p,
    some rounds have more, so that the idle time is the same for any number of microbatches that is at least p. With
    rounds of p, rank 0 holds p(1 + (p-1)/(pv)) microbatches' worth of its layers, each further rank 2/v less; larger
    rounds hold (v-1)/v more for each microbatch.
    """
    sizes = rounds(num_ranks, num_microbatches)
    lists = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        warm_up = 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * sizes[0]
        lists.append(alternating(in_rounds(stages, sizes), in_rounds(stages[::-1], sizes), warm_up))
    return Schedule.of(lists)


def rounds(num_ranks: int, num_microbatches: int) -> list[int]:
    """How many microbatches each round has: `num_ranks` or more, the first rounds at most one more than the last."""
    number = max(1, num_microbatches // num_ranks)
    least, more = divmod(num_microbatches, number)
    return [least + 1] * more + [least] * (number - more)


def in_rounds(stages: Sequence[int], sizes: Sequence[int]) -> list[Item]:
    """The order in which a rank takes its stages and the microbatches, a round through all stages after the other."""
    items: list[Item] = []
    first = 0
    for size in sizes:
        items += [((0, stage), first + i) for stage in stages for i in range(size)]
        first += size
    return items


STAGES_PER_RANK = Option("stages_per_rank", 2, "How many stages a rank holds.", smallest=1)

SCHEDULE = Registered(
    "interleaved",
    interleaved,
    "1F1B with several stages a rank: idle 1/stages_per_rank as long, with more messages and more memory.",
    (STAGES_PER_RANK,),
)
