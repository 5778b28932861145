"""PipeDream-2BW: asynchronous with two versions of the weights (Narayanan et al., arXiv 2006.09503)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.one_f_one_b import one_f_one_b
from pypar.pipeline_parallel.schedules.pipedream import with_updates
from pypar.pipeline_parallel.schedules.registered import Option, Registered


def pipedream_2bw(num_ranks: int, num_microbatches: int, *, rounds_per_update: int) -> Schedule:
    """The order of 1F1B with an update after every `rounds_per_update` times p microbatches on p ranks.

    Every microbatch of batch t takes the weights that batch t-2 left, on every stage and in both passes: the delay is
    1 everywhere, W(t+1) = W(t) - step(gradient at W(t-1)), and two versions are kept.
    """
    schedule = one_f_one_b(num_ranks, num_microbatches)
    return with_updates(
        schedule, rounds_per_update * num_ranks, {(0, stage): 1 for stage in range(num_ranks)}
    )


SCHEDULE = Registered(
    "pipedream_2bw",
    pipedream_2bw,
    "Asynchronous: an update after every batch without waiting, by gradients of weights that are one update old.",
    (
        Option(
            "rounds_per_update", 1, "How many times the number of ranks a batch has microbatches.", smallest=1
        ),
    ),
)
