"""What a real run of a schedule took: as a simulation, to be drawn beside the predicted one, and as costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Schedule,
)
from pypar.pipeline_parallel.simulate import Simulation, simulate
from pypar.pipeline_parallel.stage_cost import Costs, StageCost

Times = Sequence[Sequence[tuple[float, float]]]  # of each rank, of each action of its list: begin and end


def recorded(schedule: Schedule, times: Times, costs: Costs = None) -> Simulation:
    """The run as a simulation whose time begins with the first action.

    Args:
        times: `PipelineRuntime.times` of every rank, of clocks that agree.
        costs: of the stages, as `simulate` takes them, for the memory alone.

    ValueError where there are not as many times as actions.
    """
    _check(schedule, times)
    origin = min(begin for row in times for begin, _ in row)
    predicted = simulate(schedule, costs)
    return Simulation(
        schedule,
        [[begin - origin for begin, _ in row] for row in times],
        [[end - origin for _, end in row] for row in times],
        [sum(end - begin for begin, end in row) for row in times],
        predicted.peak_in_flight,
        predicted.peak_memory,
        predicted.weight_versions,
    )


def measured_costs(schedule: Schedule, times: Times) -> list[StageCost]:
    """The costs of each stage: the median time of each kind of action over the microbatches.

    A kind that the schedule does not have is left at 0, so a schedule of F and B says nothing of I and W. Stages of two
    paths cost the same. ValueError as in `recorded`.
    """
    _check(schedule, times)
    found: dict[tuple[int, str], list[float]] = {}
    for actions, row in zip(schedule.lists, times, strict=True):
        for action, (begin, end) in zip(actions, row, strict=True):
            found.setdefault((action.stage, action.kind), []).append(end - begin)

    def time_of(stage: int, kind: str) -> float:
        return median(found.get((stage, kind), [0.0]))

    return [
        StageCost(
            time_of(stage, FORWARD),
            time_of(stage, INPUT_GRADIENT),
            time_of(stage, WEIGHT_GRADIENT),
            backward=time_of(stage, BACKWARD) if (stage, BACKWARD) in found else None,
        )
        for stage in range(schedule.num_stages)
    ]


def _check(schedule: Schedule, times: Times) -> None:
    given, needed = [len(row) for row in times], [len(actions) for actions in schedule.lists]
    if given != needed:
        raise ValueError(
            f"there are {given} times of the ranks' actions, and the schedule has {needed} actions; pass "
            "PipelineRuntime.times of every rank, of the last step"
        )
