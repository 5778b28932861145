"""ZB-H2: no idle time where F, I and W are equal, for twice the memory of 1F1B (Qi et al., arXiv 2401.10241)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.alternating import alternating, items
from pypar.pipeline_parallel.schedules.registered import Registered


def h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """Rank r begins with 2(p-r)-1 forwards on p ranks and is always 2r weight gradients late.

    Between its first start and its last end a rank is idle for (p-1)(F+I-2W), where that is positive and there are
    2p-1 microbatches or more. Every rank holds at most 2p-1 of them.
    """
    lists = []
    for rank in range(num_ranks):
        own = items(rank, num_microbatches)
        lists.append(alternating(own, own, 2 * (num_ranks - 1 - rank), lag=2 * rank))
    return Schedule.of(lists)


SCHEDULE = Registered(
    "zb_h2",
    h2,
    "As zb_h1 with twice the forwards ahead: idle (p-1)(F+I-2W), every rank holds 2p-1 microbatches.",
)
