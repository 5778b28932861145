"""The vocabulary of a pipeline schedule: actions, what they need, and what passes between stages.

A schedule is a list per rank of `Action`s; a rank runs its list in order. The model is cut into stages 0 ..
num_stages-1. A stage lives on the one rank whose list names it, and a rank may hold several stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FORWARD = "F"
BACKWARD = "B"  # input gradient and weight gradient together
INPUT_GRADIENT = "I"
WEIGHT_GRADIENT = "W"
KINDS = (FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)


class Action(NamedTuple):
    """One piece of work of one stage on one microbatch; `kind` is one of `KINDS`."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, microbatch {self.microbatch})"


Schedule = Sequence[Sequence[Action]]


class Message(NamedTuple):
    """A tensor that one stage hands to a neighbour. `stage` is the receiving stage."""

    kind: str  # "activation" travels to the next stage, "gradient" to the previous one
    stage: int
    microbatch: int

    @property
    def sender(self) -> int:
        """The stage that makes this tensor."""
        return self.stage - 1 if self.kind == ACTIVATION else self.stage + 1


ACTIVATION = "activation"
GRADIENT = "gradient"


def sent_by(action: Action, num_stages: int) -> Message | None:
    """The message that `action` produces for another stage, None at the ends of the pipeline and for W."""
    kind, stage, microbatch = action
    if kind == FORWARD and stage + 1 < num_stages:
        return Message(ACTIVATION, stage + 1, microbatch)
    if kind in (BACKWARD, INPUT_GRADIENT) and stage > 0:
        return Message(GRADIENT, stage - 1, microbatch)
    return None


def needed_by(action: Action, num_stages: int) -> Message | None:
    """The message that `action` consumes, None where it needs nothing from a neighbour."""
    kind, stage, microbatch = action
    if kind == FORWARD and stage > 0:
        return Message(ACTIVATION, stage, microbatch)
    if kind in (BACKWARD, INPUT_GRADIENT) and stage + 1 < num_stages:
        return Message(GRADIENT, stage, microbatch)
    return None


def local_dependency(action: Action) -> Action | None:
    """What must have run before on the same stage and microbatch: F for B and I, I for W."""
    if action.kind in (BACKWARD, INPUT_GRADIENT):
        return action._replace(kind=FORWARD)
    if action.kind == WEIGHT_GRADIENT:
        return action._replace(kind=INPUT_GRADIENT)
    return None


def stage_ranks(schedule: Schedule) -> dict[int, int]:
    """Which rank holds each stage: {stage: rank}, by the first rank that names the stage."""
    ranks: dict[int, int] = {}
    for rank, actions in enumerate(schedule):
        for action in actions:
            ranks.setdefault(action.stage, rank)
    return dict(sorted(ranks.items()))


def num_microbatches_of(schedule: Schedule) -> int:
    """The number of microbatches of a schedule: its largest microbatch plus one, 0 when it is empty."""
    return 1 + max((action.microbatch for actions in schedule for action in actions), default=-1)
