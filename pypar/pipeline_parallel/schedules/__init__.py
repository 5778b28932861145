"""The pipeline schedules: one file each, with a pure function of (num_ranks, num_microbatches, options).

    schedules.names()                          ["gpipe", "one_f_one_b"]
    schedules.build("one_f_one_b", 4, 8)       the schedule of 4 ranks and 8 microbatches

A new schedule is a new file here and its line in `REGISTRY`.
"""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules import gpipe, one_f_one_b
from pypar.pipeline_parallel.schedules.registered import Option, Registered, explained, nearest

__all__ = ["REGISTRY", "Option", "Registered", "build", "explained", "names"]

REGISTRY: tuple[Registered, ...] = (
    gpipe.SCHEDULE,
    one_f_one_b.SCHEDULE,
)


def names() -> list[str]:
    """The names of all schedules, in the order of the registry."""
    return [schedule.name for schedule in REGISTRY]


def build(name: str, num_ranks: int, num_microbatches: int, **options: int | float) -> Schedule:
    """The schedule called `name` for so many ranks and microbatches.

    ValueError where no schedule has this name, it has no such option, or a number is out of bounds.
    """
    for schedule in REGISTRY:
        if schedule.name == name:
            return schedule.build(num_ranks, num_microbatches, options)
    raise ValueError(f"pipeline schedule {name!r} is not one of {', '.join(names())}{nearest(name, names())}")
