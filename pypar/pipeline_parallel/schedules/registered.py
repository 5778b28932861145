"""What the registry of schedules knows about one of them: its name, its options, what it is good for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pypar.pipeline_parallel.action import Schedule


@dataclass(frozen=True)
class Option:
    """A keyword argument of a schedule's function beside the numbers of ranks and microbatches.

    Its type is that of `default`, int or float; `smallest` and `largest` may be reached.
    """

    name: str
    default: int | float
    description: str  # one sentence
    smallest: float = -math.inf
    largest: float = math.inf

    def check(self, schedule: str, value: object) -> None:
        """ValueError where `value` is of another type, or out of bounds."""
        whole = isinstance(self.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError(
                f"option {self.name} of pipeline schedule {schedule} must be "
                f"{'a whole number' if whole else 'a number'}, not {value!r}"
            )
        if not self.smallest <= value <= self.largest:
            rule = self.bounds or "a number"
            raise ValueError(f"option {self.name} ({value}) of pipeline schedule {schedule} must be {rule}")

    @property
    def bounds(self) -> str:
        """The bounds in words, "" where there is none."""
        low = f"at least {self.smallest:g}" if self.smallest > -math.inf else ""
        high = f"at most {self.largest:g}" if self.largest < math.inf else ""
        return " and ".join(filter(None, [low, high]))


@dataclass(frozen=True)
class Registered:
    """A schedule of the registry: `function(num_ranks, num_microbatches, **options)` is pure."""

    name: str
    function: Callable[..., Schedule]
    description: str  # one sentence
    options: tuple[Option, ...] = ()

    def build(self, num_ranks: int, num_microbatches: int, options: Mapping[str, int | float]) -> Schedule:
        """The schedule for these numbers, options that are left out at their defaults.

        ValueError where there is no such option, or a number is out of bounds.
        """
        for what, number, remedy in (
            ("num_ranks", num_ranks, "pass the size of the pp axis"),
            ("num_microbatches", num_microbatches, "use 1 for no splitting"),
        ):
            if number < 1:
                raise ValueError(f"{what} ({number}) must be at least 1; {remedy}")
        known = {option.name: option for option in self.options}
        for name, value in options.items():
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(
                    f"pipeline schedule {self.name} has no option {name!r}; {has}{nearest(name, list(known))}"
                )
            known[name].check(self.name, value)
        defaults = {option.name: option.default for option in self.options}
        return self.function(num_ranks, num_microbatches, **{**defaults, **options})


def explained(schedule: Registered) -> str:
    """The schedule's name and sentence on a line, then a line an option."""
    lines = [f"{schedule.name}: {schedule.description}"]
    for option in schedule.options:
        about = " and ".join(filter(None, [option.bounds, f"{option.default} by default"]))
        lines.append(f"    --option {option.name}=NUMBER: {option.description} It is {about}.")
    return "\n".join(lines)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that offers the known name that is most like `name`, "" where none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
