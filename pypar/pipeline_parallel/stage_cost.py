"""What the actions of a stage cost in time and memory, and what a rank's list holds at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
    Message,
)


@dataclass(frozen=True)
class StageCost:
    """What one microbatch costs on one stage: times in any one unit, memory in any one unit.

    `backward` (B) is `input_gradient` + `weight_gradient` unless given. `activation` is held from F to the
    end of the backward; between I and W only `activation_for_weight` of it is still held (all of it unless
    given). `pair` is the time of a forward and a backward of this stage that run as one, as long as both one after
    the other unless given. Where activations are recomputed, `recompute` is the time that B and I take for that
    beside their own, and `recomputed` the memory that it fills until the end of the backward.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    backward: float | None = None
    activation: float = 1.0
    activation_for_weight: float | None = None
    update: float = 0.0
    pair: float | None = None
    recompute: float = 0.0
    recomputed: float = 0.0

    def time(self, kind: str) -> float:
        """Duration of an action of this kind."""
        both = self.input_gradient + self.weight_gradient
        return {
            FORWARD: self.forward,
            BACKWARD: self.recompute + (both if self.backward is None else self.backward),
            INPUT_GRADIENT: self.recompute + self.input_gradient,
            WEIGHT_GRADIENT: self.weight_gradient,
            UPDATE: self.update,
        }[kind]

    @property
    def pair_time(self) -> float:
        """Duration of a forward and a backward that run as one."""
        return self.time(FORWARD) + self.time(BACKWARD) if self.pair is None else self.pair

    def memory_change(self, kind: str) -> float:
        """How much more memory is held after an action of this kind than before."""
        for_weight = self.activation if self.activation_for_weight is None else self.activation_for_weight
        for_weight += self.recomputed
        return {
            FORWARD: self.activation,
            BACKWARD: -self.activation,
            INPUT_GRADIENT: for_weight - self.activation,
            WEIGHT_GRADIENT: -for_weight,
            UPDATE: 0.0,
        }[kind]

    def shared(self, stages_per_rank: int) -> StageCost:
        """The cost of one of so many equal stages that share what this one has."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        parts: dict[str, Any] = {name: None if x is None else x / stages_per_rank for name, x in own.items()}
        return StageCost(**parts)


Costs = StageCost | Sequence[StageCost] | None

# The time of a message between two ranks: one for all, or by (sending stage, receiving stage).
Communication = float | Callable[[int, int], float]


def time_of(message: Message, communication: Communication) -> float:
    """The time that a message between two ranks takes."""
    return communication(message.sender[1], message.stage) if callable(communication) else communication


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


def held_during(actions: Sequence[Action], costs: Sequence[StageCost]) -> Iterator[float]:
    """The most memory of activations that a rank holds from the begin of each action to its end.

    A backward has at its beginning what was saved and what it recomputes.
    """
    before = 0.0
    for action, after in zip(actions, held_after(actions, costs), strict=True):
        more = costs[action.stage].recomputed if action.kind in (BACKWARD, INPUT_GRADIENT) else 0.0
        yield max(before + more, after)
        before = after


def peak_memory(actions: Sequence[Action], costs: Sequence[StageCost]) -> float:
    """The most memory of activations that a rank holds at once, in the unit of `StageCost.activation`."""
    return max(held_during(actions, costs), default=0.0)


def peak_in_flight(actions: Sequence[Action], num_stages: int) -> int:
    """The most microbatches that a rank holds at once from F to B or W, all its stages together."""
    return int(peak_memory(actions, [StageCost()] * num_stages))
