"""What the registry of schedules knows about one of them: its name, its options, what it is good for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.stage_cost import Communication, Costs, per_stage, time_of


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
    """A schedule of the registry: `function(num_ranks, num_microbatches, **options)` is pure.

    takes_costs: the lists depend on what the stages cost; `function` has the arguments `costs`, one a stage, and
        `delay`, the time of a message between ranks, too. Then `stages_per_rank` says how many stages there are.
    """

    name: str
    function: Callable[..., Schedule]
    description: str  # one sentence
    options: tuple[Option, ...] = ()
    takes_costs: bool = False
    stages_per_rank: int = 1

    def build(
        self,
        num_ranks: int,
        num_microbatches: int,
        options: Mapping[str, int | float],
        costs: Costs = None,
        communication: Communication = 0.0,
    ) -> Schedule:
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
        given: dict[str, Any] = {option.name: option.default for option in self.options} | dict(options)
        if self.takes_costs:
            given["costs"] = per_stage(costs, num_ranks * self.stages_per_rank)
            given["delay"] = partial(time_of, communication=communication)
        return self.function(num_ranks, num_microbatches, **given)


def explained(schedule: Registered) -> str:
    """The schedule's name and sentence on a line, then a line an option."""
    lines = [f"{schedule.name}: {schedule.description}"]
    for option in schedule.options:
        about = " and ".join(filter(None, [option.bounds, f"{option.default} by default"]))
        lines.append(f"    --option {option.name}=NUMBER: {option.description} It is {about}.")
    return "\n".join(lines)


def options_of(text: str) -> Mapping[str, int | float]:
    """{name: number} of a text "name=number,name=number"; ValueError for another form."""
    options: dict[str, int | float] = {}
    for each in filter(None, text.split(",")):
        name, _, number = each.strip().partition("=")
        if name in options:
            raise ValueError(f"schedule option {name} is given twice in {text!r}; give it once")
        try:
            options[name] = float(number) if set(number) & set(".eE") else int(number)
        except ValueError:
            raise ValueError(
                f"schedule option {each!r} must be a name, = and a number, such as stages_per_rank=2"
            ) from None
    return options


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that offers the known name that is most like `name`, "" where none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_even(schedule: str, num_ranks: int) -> None:
    """ValueError for an odd number of ranks, where two directions meet in the middle."""
    if num_ranks % 2:
        raise ValueError(
            f"num_ranks ({num_ranks}) must be even for pipeline schedule {schedule}, whose two directions meet "
            f"between two ranks; use {num_ranks + 1} ranks, or a schedule of one direction"
        )
