"""The pipeline schedules: one file each, with a pure function of (num_ranks, num_microbatches, options).

    schedules.names()                          ["gpipe", "one_f_one_b", ...]
    schedules.build("one_f_one_b", 4, 8)       the schedule of 4 ranks and 8 microbatches

A new schedule is a new file here and its line in `REGISTRY`.
"""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules import (
    breadth_first,
    chimera,
    dualpipe,
    dualpipe_v,
    gpipe,
    interleaved,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    seq1f1b,
)
from pypar.pipeline_parallel.schedules.registered import Option, Registered, explained, nearest
from pypar.pipeline_parallel.schedules.zero_bubble import controllable, h1, h2, search, v
from pypar.pipeline_parallel.stage_cost import Communication, Costs

__all__ = ["REGISTRY", "Option", "Registered", "build", "explained", "find", "names"]

REGISTRY: tuple[Registered, ...] = (
    gpipe.SCHEDULE,
    one_f_one_b.SCHEDULE,
    interleaved.SCHEDULE,
    breadth_first.SCHEDULE,
    h1.SCHEDULE,
    h2.SCHEDULE,
    search.ZB_1P,
    search.ZB_2P,
    v.SCHEDULE,
    controllable.V_HALF,
    controllable.V_MIN,
    chimera.SCHEDULE,
    dualpipe.SCHEDULE,
    dualpipe_v.SCHEDULE,
    seq1f1b.SCHEDULE,
    pipedream.SCHEDULE,
    pipedream_2bw.SCHEDULE,
)


def names() -> list[str]:
    """The names of all schedules, in the order of the registry."""
    return [schedule.name for schedule in REGISTRY]


def find(name: str) -> Registered:
    """The schedule called `name`; ValueError where there is none."""
    for schedule in REGISTRY:
        if schedule.name == name:
            return schedule
    raise ValueError(f"pipeline schedule {name!r} is not one of {', '.join(names())}{nearest(name, names())}")


def build(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    costs: Costs = None,
    communication: Communication = 0.0,
    **options: int | float,
) -> Schedule:
    """The schedule called `name` for so many ranks and microbatches.

    costs, communication: as `simulate` takes them; for the schedules that are made for given costs.

    ValueError where no schedule has this name, it has no such option, or a number is out of bounds.
    """
    return find(name).build(num_ranks, num_microbatches, options, costs, communication)
