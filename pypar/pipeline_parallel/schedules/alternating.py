"""The frame of the 1F1B family: some forwards first, then a forward and a backward in turn, then what is left."""

from __future__ import annotations

from collections.abc import Sequence

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Place

Item = tuple[Place, int]  # a stage and its path, and a microbatch


def items(stage: int, num_microbatches: int) -> list[Item]:
    """All microbatches of one stage, in order."""
    return [((0, stage), i) for i in range(num_microbatches)]


def alternating(
    forwards: Sequence[Item], backwards: Sequence[Item], warm_up: int, *, lag: int | None = None
) -> list[Action]:
    """One rank's list: `warm_up` forwards, then a forward and a backward in turn until the forwards are used up.

    Args:
        forwards, backwards: the same items, each in the order in which the rank takes them.
        lag: None for whole backwards. A number splits them: after the backward number i (from 0) of the list
            comes the weight gradient of backward number i - lag, and the last `lag` of them end the list.
    """
    warm_up = min(warm_up, len(forwards))
    actions = [_action(FORWARD, item) for item in forwards[:warm_up]]
    for i, item in enumerate(backwards):
        actions += [_action(FORWARD, each) for each in forwards[warm_up + i : warm_up + i + 1]]
        actions.append(_action(BACKWARD if lag is None else INPUT_GRADIENT, item))
        if lag is not None and i >= lag:
            actions.append(_action(WEIGHT_GRADIENT, backwards[i - lag]))
    if lag is not None:
        actions += [_action(WEIGHT_GRADIENT, item) for item in backwards[max(0, len(backwards) - lag) :]]
    return actions


def _action(kind: str, item: Item) -> Action:
    (path, stage), microbatch = item
    return Action(kind, stage, microbatch, path)
