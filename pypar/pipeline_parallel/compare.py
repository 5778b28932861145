"""What schedules cost beside each other, for one set of measured times, and which is the fastest that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import BACKWARD, INPUT_GRADIENT, Schedule
from pypar.pipeline_parallel.simulate import Simulation, simulate
from pypar.pipeline_parallel.stage_cost import StageCost
from pypar.pipeline_parallel.trained import check_trains
from pypar.pipeline_parallel.validate.deadlock import buffers_needed

Options = Mapping[str, int | float]


# What `RankCost.parse` calls the fields of StageCost.
COSTS = {
    "F": "forward",
    "I": "input_gradient",
    "W": "weight_gradient",
    "B": "backward",
    "pair": "pair",
    "recompute": "recompute",
    "U": "update",
    "kept": "activation_for_weight",
}
COMMUNICATION = "comm"
MOST = 1e12  # a cost; sums of many are still exact enough
HALF = 0.5  # of a layer's activations, is what its weight gradients need, unless it is told; 0.37 to 0.94 by the paper


@dataclass(frozen=True)
class RankCost:
    """What one microbatch costs on all layers of a rank, and a message between two ranks.

    A rank with several stages shares `layers` among them; a segment of a sequence takes its share of `layers` and of
    `communication`. A second path holds the layers once more.
    """

    layers: StageCost = StageCost()
    communication: float = 0.0

    @classmethod
    def parse(cls, text: str, *, kept: float = HALF) -> RankCost:
        """From "F=1,I=1,W=1,comm=0.1", with `kept` where it says nothing of it.

        ValueError for an unknown name, one that is given twice, what is no number from 0 to MOST, a share above 1, or
        a forward and a backward that take no time.
        """
        values: dict[str, float] = {}
        for each in filter(None, text.split(",")):
            name, _, number = each.strip().partition("=")
            if name not in (*COSTS, COMMUNICATION):
                known = ", ".join([*COSTS, COMMUNICATION])
                raise ValueError(
                    f"cost {name!r} is not one of {known}{schedules.nearest(name, [*COSTS, COMMUNICATION])}"
                )
            if name in values:
                raise ValueError(f"cost {name!r} is given twice in {text!r}; give it once")
            try:
                values[name] = float(number)
            except ValueError:
                values[name] = -1.0
            if not 0 <= values[name] <= MOST:
                raise ValueError(
                    f"cost {each.strip()!r} must be a number from 0 to {MOST:g}, such as {name}=0.5"
                )
        if values.get("kept", 0.0) > 1:
            raise ValueError(f"cost kept={values['kept']:g} is a share, which is at most 1; kept=1 keeps all")
        communication = values.pop(COMMUNICATION, 0.0)
        times: dict[str, Any] = {COSTS[name]: value for name, value in values.items()}
        layers = StageCost(**{"activation_for_weight": kept, **times})
        if not (
            layers.forward and layers.time(BACKWARD) and layers.time(INPUT_GRADIENT) + layers.weight_gradient
        ):
            raise ValueError(
                f"costs {text!r} leave a forward or a backward no time; give F, and I, W or B, above 0"
            )
        return cls(layers, communication)


@dataclass(frozen=True)
class Estimate:
    """One schedule, simulated; without a schedule `fault` says why there is none."""

    name: str
    schedule: Schedule | None = None
    simulation: Simulation | None = None
    fault: str = ""

    @property
    def is_legal(self) -> bool:
        """Whether the schedule exists for these numbers and is valid."""
        return self.simulation is not None

    @property
    def shares(self) -> int:
        """Into how many parts the work of a rank on one microbatch is cut: stages and segments."""
        return 1 if self.schedule is None else parts_of(self.schedule)

    @property
    def peak_in_flight(self) -> list[float]:
        """What each rank holds at most from F to B or W, in microbatches of all its layers."""
        return [] if self.simulation is None else [x / self.shares for x in self.simulation.peak_in_flight]

    @property
    def time(self) -> float:
        """The makespan, infinite for a schedule that is not legal."""
        return math.inf if self.simulation is None else self.simulation.makespan

    @property
    def memory(self) -> float:
        """The most that a rank holds, infinite for a schedule that is not legal."""
        return math.inf if self.simulation is None else max(self.simulation.peak_memory)

    @property
    def refused(self) -> str:
        """Why a run cannot have a legal schedule, in a sentence, "" where it can."""
        try:
            if self.schedule is not None:
                check_trains(self.name, self.schedule)
        except ValueError as refused:
            return str(refused)
        return ""

    @property
    def facts(self) -> dict[str, Any]:
        """Everything, by name; times in the unit of the costs, per rank where it is a list."""
        found: dict[str, Any] = {"name": self.name, "legal": self.is_legal}
        result, schedule = self.simulation, self.schedule
        if result is None or schedule is None:
            return found | {"fault": self.fault}
        return found | {
            "ranks": schedule.num_ranks,
            "microbatches": schedule.num_microbatches // schedule.num_segments,
            "stages_per_rank": schedule.stages_per_rank,
            "paths": schedule.num_paths,
            "segments": schedule.num_segments,
            "makespan": result.makespan,
            "span": result.span,
            "makespan_bubble_rate": result.makespan_bubble,
            "span_bubble_rate": result.span_bubble,
            "busy": result.busy,
            "peak_in_flight": self.peak_in_flight,
            "peak_memory": result.peak_memory,
            "weight_versions": result.weight_versions,
            "buffers": buffers_needed(schedule),
            "refused": self.refused,
        }


def parts_of(schedule: Schedule) -> int:
    """Into how many actions of one kind the work of a rank on one microbatch of a path is cut."""
    return schedule.stages_per_rank * schedule.num_segments


def estimate(
    name: str, num_ranks: int, num_microbatches: int, cost: RankCost, options: Options | None = None
) -> Estimate:
    """Builds a schedule by its name and simulates it; ValueError as `schedules.build`."""
    registered = schedules.find(name)
    of_stage = cost.layers.shared(registered.stages_per_rank)
    schedule = registered.build(num_ranks, num_microbatches, options or {}, of_stage, cost.communication)
    return estimate_of(name, schedule, cost)


def estimate_of(name: str, schedule: Schedule, cost: RankCost) -> Estimate:
    """Simulates a schedule; ValueError where it is not valid."""
    communication = cost.communication / schedule.num_segments
    return Estimate(name, schedule, simulate(schedule, cost.layers.shared(parts_of(schedule)), communication))


def compared(num_ranks: int, num_microbatches: int, cost: RankCost) -> list[Estimate]:
    """All schedules at their options' defaults; one that does not exist for these numbers with its reason."""
    found = []
    for name in schedules.names():
        try:
            found.append(estimate(name, num_ranks, num_microbatches, cost))
        except ValueError as refused:
            found.append(Estimate(name, fault=str(refused)))
    return found


def choose(
    num_ranks: int,
    num_microbatches: int,
    cost: RankCost,
    *,
    most_stages: float = math.inf,
    memory: float = math.inf,
) -> tuple[Estimate, str]:
    """The schedule with the shortest step of those that a run can have and that fit, and why, in a sentence.

    The step is the makespan, as the optimizer waits for all ranks.

    Args:
        most_stages: into how many stages the model can be cut.
        memory: the most that a rank may hold, in microbatches of activations of its layers.

    ValueError where none fits.
    """
    fitting: list[Estimate] = []
    left_out: dict[str, list[str]] = {}
    for each in compared(num_ranks, num_microbatches, cost):
        reason = _unfit(each, most_stages, memory)
        if reason:
            left_out.setdefault(reason, []).append(each.name)
        else:
            fitting.append(each)
    if not fitting:
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in left_out.items())
        raise ValueError(
            f"no pipeline schedule fits ({told}); allow more memory or use smaller "
            "microbatches, and no more stages than the model has layers"
        )
    best, *others = sorted(fitting, key=lambda each: (each.time, each.memory))
    why = f"{best.name} is the fastest of {len(fitting)} that fit, with {best.time:.4g} a step and {best.memory:.4g} "
    why += "microbatches of activations on a rank"
    if others:
        why += f"; next are {', '.join(f'{each.name} with {each.time:.4g}' for each in others[:3])}"
    return best, why + "".join(f"; {reason}: {', '.join(names)}" for reason, names in left_out.items())


def _unfit(each: Estimate, most_stages: float, memory: float) -> str:
    """Why a run cannot have a schedule, "" where it can."""
    if each.schedule is None:
        return "do not exist for so many ranks"
    if each.refused:
        return "no run can have"
    if each.schedule.num_stages > most_stages:
        return f"have more stages than {most_stages:g}"
    return "" if each.memory <= memory * (1 + 1e-9) else f"hold more than {memory:g}"


def table(estimates: Sequence[Estimate]) -> str:
    """A line a schedule: whether it is legal and whether a run can have it, the time of a step, both bubbles, the most
    memory of a rank, copies and versions of weights.
    """
    head = [
        "schedule",
        "legal",
        "makespan",
        "bubble",
        "span bubble",
        "in flight",
        "memory",
        "weights",
        "trains",
    ]
    rows = [head]
    for each in estimates:
        result, schedule = each.simulation, each.schedule
        if result is None or schedule is None:
            rows.append([each.name, "no: " + each.fault])
            continue
        weights = max(result.weight_versions) * schedule.num_paths
        rows.append(
            [
                each.name,
                "yes",
                f"{result.makespan:.6g}",
                f"{result.makespan_bubble:.2%}",
                f"{result.span_bubble:.2%}",
                f"{max(each.peak_in_flight):.4g}",
                f"{max(result.peak_memory):.4g}",
                f"{weights}x",
                "no" if each.refused else "yes",
            ]
        )
    widths = [max(len(row[column]) for row in rows if len(row) == len(head)) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if column < 2 else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )
