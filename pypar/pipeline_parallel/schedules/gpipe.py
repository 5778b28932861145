"""GPipe: all forwards, then all backwards (Huang et al., arXiv 1811.06965)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, Action, Schedule
from pypar.pipeline_parallel.schedules.registered import Registered


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Stage r is on rank r, and every rank holds the activations of all microbatches at its peak.

    With equal stages the share of idle time is (p-1)/(m+p-1) for p ranks and m microbatches. Backwards run in
    the order of the forwards.
    """
    return Schedule.of(
        [Action(kind, rank, i) for kind in (FORWARD, BACKWARD) for i in range(num_microbatches)]
        for rank in range(num_ranks)
    )


SCHEDULE = Registered(
    "gpipe", gpipe, "All forwards, then all backwards; every rank holds all microbatches at its peak."
)
