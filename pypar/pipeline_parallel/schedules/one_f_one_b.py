"""1F1B: one forward, one backward in turn (PipeDream-Flush, Narayanan et al., arXiv 2006.09503; Megatron-LM,
2104.04473).
"""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.alternating import alternating, items
from pypar.pipeline_parallel.schedules.registered import Registered


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Stage r is on rank r, which starts with min(m, p-1-r) forwards of m microbatches on p ranks.

    So a rank never holds more than min(m, p-r) microbatches; the idle time is that of GPipe.
    """
    lists = []
    for rank in range(num_ranks):
        own = items(rank, num_microbatches)
        lists.append(alternating(own, own, num_ranks - 1 - rank))
    return Schedule.of(lists)


SCHEDULE = Registered(
    "one_f_one_b",
    one_f_one_b,
    "One forward, one backward in turn; idle as long as gpipe, but rank r holds at most p-r microbatches.",
)
