"""Seq1F1B: 1F1B over parts of sequences (Sun et al., arXiv 2406.03488)."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.alternating import alternating
from pypar.pipeline_parallel.schedules.registered import Option, Registered


def seq1f1b(num_ranks: int, num_microbatches: int, *, num_segments: int) -> Schedule:
    """Each microbatch is cut along the sequence into k segments, microbatch i into the numbers i k ... i k + k-1.

    A segment attends to keys and values of those before it, so their gradients are complete only after those
    behind it: forwards ascend within a microbatch and backwards descend. A rank holds p-r+k-1 segments at most, of
    1/k microbatch each, and the idle time of 1F1B falls to about 1/k.
    """
    total = num_microbatches * num_segments
    lists = []
    for rank in range(num_ranks):
        forwards = [((0, rank), i) for i in range(total)]
        backwards = [
            ((0, rank), first + i)
            for first in range(0, total, num_segments)
            for i in reversed(range(num_segments))
        ]
        lists.append(alternating(forwards, backwards, num_ranks - 2 - rank + num_segments))
    return Schedule.of(lists, num_segments=num_segments)


SCHEDULE = Registered(
    "seq1f1b",
    seq1f1b,
    "1F1B over segments of sequences, whose keys and values are kept: less idle time and less memory.",
    (Option("num_segments", 4, "Into how many segments a sequence is cut.", smallest=1),),
)
