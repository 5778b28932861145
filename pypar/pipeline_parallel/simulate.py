"""Simulates a schedule: when each action runs, how long a step takes, how much of it is idle and what it
holds in memory.

It runs the very lists that the runtime runs. Checked against the measured tables of the zero-bubble paper
(Qi et al., arXiv 2401.10241, tables 5 and 9).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Message,
    Schedule,
    needed_by,
    sent_by,
    stage_ranks,
)
from pypar.pipeline_parallel.validate import validate


@dataclass(frozen=True)
class StageCost:
    """What one microbatch costs on one stage: times in any one unit, memory in any one unit.

    `backward` (B) is `input_gradient` + `weight_gradient` unless given. `activation` is held from F to the
    end of the backward; between I and W only `activation_for_weight` of it is still held (all of it unless
    given).
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    backward: float | None = None
    activation: float = 1.0
    activation_for_weight: float | None = None

    def time(self, kind: str) -> float:
        """Duration of an action of this kind."""
        if kind == BACKWARD:
            return self.input_gradient + self.weight_gradient if self.backward is None else self.backward
        if kind == FORWARD:
            return self.forward
        return self.input_gradient if kind == INPUT_GRADIENT else self.weight_gradient

    def memory_change(self, kind: str) -> float:
        """How much more memory is held after an action of this kind than before."""
        for_weight = self.activation if self.activation_for_weight is None else self.activation_for_weight
        changes = {
            FORWARD: self.activation,
            BACKWARD: -self.activation,
            INPUT_GRADIENT: for_weight - self.activation,
            WEIGHT_GRADIENT: -for_weight,
        }
        return changes[kind]


@dataclass(frozen=True)
class Simulation:
    """The outcome of `simulate`. Lists are per rank; `start` and `end` per rank and position in its list."""

    schedule: Schedule
    start: list[list[float]]
    end: list[list[float]]
    busy: list[float]  # time spent in actions
    peak_in_flight: list[int]  # most microbatches held at once, all stages of the rank together
    peak_memory: list[float]  # the same in the unit of StageCost.activation

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
        """Idle share of the makespan: (makespan - mean busy time of the ranks) / makespan."""
        return 1.0 - sum(self.busy) / len(self.busy) / self.makespan


def simulate(
    schedule: Schedule,
    costs: StageCost | Sequence[StageCost] | None = None,
    communication: float | Callable[[int, int], float] = 0.0,
    *,
    forward_only: bool = False,
) -> Simulation:
    """Runs `schedule` in simulated time, each action as soon as its rank is free and its input is there.

    Args:
        costs: one `StageCost` for every stage, or one for all; equal times of 1 by default.
        communication: time from the end of an action to the arrival of its tensor on another rank, in which
            both ranks may compute: a number, or a function of (sending stage, receiving stage). Stages of
            one rank need none.

    Raises ValueError for a schedule that `validate` refuses, or a number of costs that is not the number of
    stages.
    """
    validate(schedule, forward_only=forward_only)
    ranks = stage_ranks(schedule)
    per_stage = _per_stage(costs, len(ranks))
    delay = communication if callable(communication) else lambda sender, receiver: communication
    arrival: dict[Message, float] = {}
    start: list[list[float]] = [[] for _ in schedule]
    end: list[list[float]] = [[] for _ in schedule]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while len(end[rank]) < len(actions):
                action = actions[len(end[rank])]
                needed = needed_by(action, len(ranks))
                if needed is not None and needed not in arrival:
                    break
                begins = end[rank][-1] if end[rank] else 0.0
                if needed is not None:
                    begins = max(begins, arrival[needed])
                ends = begins + per_stage[action.stage].time(action.kind)
                made = sent_by(action, len(ranks))
                if made is not None and ranks[made.stage] == rank:
                    arrival[made] = ends
                elif made is not None:
                    arrival[made] = ends + delay(action.stage, made.stage)
                start[rank].append(begins)
                end[rank].append(ends)
                moved = True
    busy = [sum(per_stage[a.stage].time(a.kind) for a in actions) for actions in schedule]
    in_flight = [_peak([_count_change(a) for a in actions]) for actions in schedule]
    memory = [_peak([per_stage[a.stage].memory_change(a.kind) for a in actions]) for actions in schedule]
    return Simulation(schedule, start, end, busy, [int(count) for count in in_flight], memory)


def bubble_by_formula(num_ranks: int, num_microbatches: int) -> float:
    """Idle share of `gpipe` and `one_f_one_b` with equal stages and no communication time: (p-1)/(m+p-1)."""
    return (num_ranks - 1) / (num_microbatches + num_ranks - 1)


def _per_stage(costs: StageCost | Sequence[StageCost] | None, num_stages: int) -> Sequence[StageCost]:
    if costs is None or isinstance(costs, StageCost):
        return [costs or StageCost()] * num_stages
    if len(costs) != num_stages:
        raise ValueError(
            f"costs has {len(costs)} entries but the schedule has {num_stages} stages; pass one a stage"
        )
    return costs


def _count_change(action: Action) -> int:
    return {FORWARD: 1, BACKWARD: -1, INPUT_GRADIENT: 0, WEIGHT_GRADIENT: -1}[action.kind]


def _peak(changes: Sequence[float]) -> float:
    held = peak = 0.0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak
