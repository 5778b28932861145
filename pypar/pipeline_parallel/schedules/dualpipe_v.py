"""DualPipeV: DualPipe without the second copy of the parameters (DeepSeek, after Sea AI Lab's "cut-in-half")."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules.dualpipe import fill
from pypar.pipeline_parallel.schedules.registered import Registered
from pypar.pipeline_parallel.schedules.row import Row
from pypar.pipeline_parallel.schedules.zero_bubble.v import v_places


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Two stages a rank in a V, as ranks r and 2p-1-r of a DualPipe on 2p ranks would have them.

    With O for a forward and a backward that run as one, B for a whole backward of a stage, the idle time of p ranks
    is (p-1)(O+B-3W). A rank holds at most 2p+1 microbatches of a stage. With fewer than 2p microbatches there is more
    idle time.
    """
    lists, pairs = [], set()
    for rank in range(num_ranks):
        row = Row(v_places(rank, num_ranks))
        fill(row, num_ranks, rank, max(2 * num_ranks, num_microbatches))
        lists.append(row.actions)
        pairs |= {(rank, position) for position in row.pairs}
    return Schedule.of(lists, pairs=pairs).first(num_microbatches)


SCHEDULE = Registered(
    "dualpipe_v", dualpipe_v, "Two stages a rank in a V, a forward beside a backward; parameters once."
)
