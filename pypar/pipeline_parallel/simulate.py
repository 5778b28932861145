"""Simulates a pipeline schedule: when each action runs, how long a step takes, how much of it is idle and
what it holds in memory.

It runs the very lists that the runtime runs. Checked against the measured tables of the zero-bubble paper
(Qi et al., arXiv 2401.10241, tables 5 and 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.pipeline_parallel.action import Action, Message, Schedule
from pypar.pipeline_parallel.stage_cost import (
    Communication,
    Costs,
    StageCost,
    peak_in_flight,
    peak_memory,
    per_stage,
    time_of,
)
from pypar.pipeline_parallel.validate import validate
from pypar.pipeline_parallel.validate.versions import weight_versions


@dataclass(frozen=True)
class Simulation:
    """The outcome of `simulate`. Lists are per rank; `start` and `end` per rank and position in its list."""

    schedule: Schedule
    start: list[list[float]]
    end: list[list[float]]
    busy: list[float]  # time spent in actions
    peak_in_flight: list[int]  # most microbatches held at once, all stages of the rank together
    peak_memory: list[float]  # the same in the unit of StageCost.activation
    weight_versions: list[int]  # most versions of a stage's weights that the rank keeps

    @property
    def makespan(self) -> float:
        """From the first start to the last end over all ranks."""
        return max(e[-1] for e in self.end if e) - min(s[0] for s in self.start if s)

    @property
    def span(self) -> float:
        """The longest time from a rank's first start to its last end: the cost of a step among many."""
        return max(e[-1] - s[0] for s, e in zip(self.start, self.end, strict=True) if s)

    @property
    def span_bubble(self) -> float:
        """Idle share of the span: (span - mean busy time of the ranks) / span.

        With equal stages the mean busy time is m (T_F + T_I + T_W), and this is the bubble rate of arXiv
        2401.10241. With unequal stages the time that the lighter ranks spend waiting for the heaviest counts
        as idle.
        """
        return 1.0 - sum(self.busy) / len(self.busy) / self.span

    @property
    def makespan_bubble(self) -> float:
        """Idle share of the makespan, in which ranks also wait for their first input and after their last action."""
        return 1.0 - sum(self.busy) / len(self.busy) / self.makespan


def simulate(
    schedule: Schedule,
    costs: Costs = None,
    communication: Communication = 0.0,
    *,
    forward_only: bool = False,
) -> Simulation:
    """Runs `schedule` in simulated time, each action as soon as its rank is free and its input is there.

    A pair begins when the inputs of both its actions are there, and what both make leaves at its end. Its time is the
    mean of the two stages' `StageCost.pair_time`.

    Args:
        costs: one `StageCost` for every stage, or one for all; equal times of 1 by default. The copies of a
            stage on several paths cost the same.
        communication: time from the end of an action to the arrival of what it made on another rank, in
            which both ranks may compute: a number, or a function of (sending stage, receiving stage). Stages
            of one rank need none.

    Raises ValueError for a schedule that `validate` refuses, or a number of costs that is not the number of
    stages.
    """
    validate(schedule, forward_only=forward_only)
    stages = per_stage(costs, schedule.num_stages)
    arrival: dict[Message | None, float] = {None: 0.0}
    start: list[list[float]] = [[] for _ in schedule.lists]
    end: list[list[float]] = [[] for _ in schedule.lists]
    busy = [0.0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.lists):
            while len(end[rank]) < len(actions):
                first = len(end[rank])
                together = actions[first : first + 1 + ((rank, first) in schedule.pairs)]
                needed = [schedule.needed_by(action) for action in together]
                if any(message not in arrival for message in needed):
                    break
                begins = max(end[rank][-1] if end[rank] else 0.0, *(arrival[message] for message in needed))
                takes = _time(together, stages)
                ends = begins + takes
                busy[rank] += takes
                for action in together:
                    made = schedule.sent_by(action)
                    if made is not None:
                        arrival[made] = ends + _delay(schedule, made, communication)
                    start[rank].append(begins)
                    end[rank].append(ends)
                moved = True
    return Simulation(
        schedule,
        start,
        end,
        busy,
        [peak_in_flight(actions, schedule.num_stages) for actions in schedule.lists],
        [peak_memory(actions, stages) for actions in schedule.lists],
        weight_versions(schedule),
    )


def _time(together: Sequence[Action], stages: Sequence[StageCost]) -> float:
    """The duration of an action, or of the two actions of a pair."""
    if len(together) == 1:
        return stages[together[0].stage].time(together[0].kind)
    return sum(stages[action.stage].pair_time for action in together) / len(together)


def _delay(schedule: Schedule, message: Message, communication: Communication) -> float:
    """The time from the end of the action that made `message` to its arrival."""
    near = schedule.placement[message.sender] == schedule.placement[message.receiver]
    return 0.0 if near else time_of(message, communication)
