"""Finds a schedule by its name."""

from __future__ import annotations

import difflib
import inspect

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Action


def names() -> list[str]:
    """The names of all schedules, sorted."""
    return sorted(name for name in vars(schedules) if _is_schedule(name))


def build(name: str, num_ranks: int, num_microbatches: int, **options: int) -> list[list[Action]]:
    """The schedule called `name`; `options` are its further arguments. ValueError when none is."""
    if not _is_schedule(name):
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "use one of them"
        raise ValueError(f"pipeline schedule {name!r} is not one of {', '.join(names())}; {hint}")
    schedule: list[list[Action]] = getattr(schedules, name)(num_ranks, num_microbatches, **options)
    return schedule


def _is_schedule(name: str) -> bool:
    function = getattr(schedules, name, None)
    if name.startswith("_") or not inspect.isfunction(function):
        return False
    return list(inspect.signature(function).parameters)[:2] == ["num_ranks", "num_microbatches"]
