"""ZB-V: no idle time where F, I and W are equal, in the memory of 1F1B (Qi et al., arXiv 2401.10241, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pypar.pipeline_parallel.action import Message, Place, Schedule
from pypar.pipeline_parallel.schedules.registered import Option, Registered
from pypar.pipeline_parallel.schedules.row import Row
from pypar.pipeline_parallel.schedules.zero_bubble.search import MEMORY, shortest
from pypar.pipeline_parallel.stage_cost import StageCost


def v(
    num_ranks: int,
    num_microbatches: int,
    *,
    costs: Sequence[StageCost],
    delay: Callable[[Message], float],
    memory: float,
) -> Schedule:
    """Two stages a rank, s and 2p-1-s on rank s of p ranks: the way through the model goes down and back up.

    So the last stage is on rank 0, whose first backward comes early. Every rank holds at most 2p microbatches of a
    stage, as much as p of one stage of twice the size. With fewer than 2p-1 microbatches there is idle time. Forwards
    and input gradients come in the published order; where costs differ, weight gradients move to the gaps, within
    `memory` times the activations of p microbatches on the rank's stages.
    """
    filled = max(2 * num_ranks - 1, num_microbatches)
    lists = []
    for rank in range(num_ranks):
        row = Row(v_places(rank, num_ranks))
        row.add("F0", 2 * (num_ranks - rank) - 1)
        row.add("F1 F0", rank)
        row.add("F1 I1 W1", num_ranks - rank)
        while row.num_forwards(1) < filled:
            row.add("F0" if row.num_forwards(0) < filled else "")
            row.add("I0 W0 F1 I1 W1")
        row.add("I0 I1", rank)
        row.add("I0 W0", num_ranks - rank)
        row.add("W1", rank)
        row.add("W0", rank)
        lists.append(row.actions)
    schedule = Schedule.of(lists).first(num_microbatches)
    if len(set(costs)) == 1 and costs[0].forward == costs[0].input_gradient == costs[0].weight_gradient:
        return schedule
    limits = [
        memory * num_ranks * sum(costs[stage].activation for _, stage in v_places(rank, num_ranks))
        for rank in range(num_ranks)
    ]
    return shortest([schedule], [], costs, delay, limits)


def v_places(rank: int, num_ranks: int) -> tuple[Place, Place]:
    """The two stages of a rank where the stages go down the ranks and back up."""
    return (0, rank), (0, 2 * num_ranks - 1 - rank)


SCHEDULE = Registered(
    "zb_v",
    v,
    "Backward in two parts, two stages a rank in a V: no idle time for equal F, I and W, the memory of one_f_one_b.",
    (Option("memory", 1.0, MEMORY, smallest=1),),
    takes_costs=True,
    stages_per_rank=2,
)
