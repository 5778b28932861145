"""What the actions of a stage cost in time and memory, and what a rank's list holds at its peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
)


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
    update: float = 0.0

    def time(self, kind: str) -> float:
        """Duration of an action of this kind."""
        both = self.input_gradient + self.weight_gradient
        return {
            FORWARD: self.forward,
            BACKWARD: both if self.backward is None else self.backward,
            INPUT_GRADIENT: self.input_gradient,
            WEIGHT_GRADIENT: self.weight_gradient,
            UPDATE: self.update,
        }[kind]

    def memory_change(self, kind: str) -> float:
        """How much more memory is held after an action of this kind than before."""
        for_weight = self.activation if self.activation_for_weight is None else self.activation_for_weight
        return {
            FORWARD: self.activation,
            BACKWARD: -self.activation,
            INPUT_GRADIENT: for_weight - self.activation,
            WEIGHT_GRADIENT: -for_weight,
            UPDATE: 0.0,
        }[kind]


Costs = StageCost | Sequence[StageCost] | None


def per_stage(costs: Costs, num_stages: int) -> Sequence[StageCost]:
    """One `StageCost` a stage from one for all (None: all times and activations 1), or from as many as stages."""
    if costs is None or isinstance(costs, StageCost):
        return [costs or StageCost()] * num_stages
    if len(costs) != num_stages:
        raise ValueError(
            f"costs has {len(costs)} entries but the schedule has {num_stages} stages; pass one a stage"
        )
    return costs


def held_after(actions: Sequence[Action], costs: Sequence[StageCost]) -> Iterator[float]:
    """The memory of activations that a rank holds after each of its actions; `costs` has one entry a stage."""
    held = 0.0
    for action in actions:
        held += costs[action.stage].memory_change(action.kind)
        yield held


def peak_memory(actions: Sequence[Action], costs: Sequence[StageCost]) -> float:
    """The most memory of activations that a rank holds at once, in the unit of `StageCost.activation`."""
    return max(held_after(actions, costs), default=0.0)


def peak_in_flight(actions: Sequence[Action], num_stages: int) -> int:
    """The most microbatches that a rank holds at once from F to B or W, all its stages together."""
    return int(peak_memory(actions, [StageCost()] * num_stages))
