"""One rank's list as it is written down phase by phase, each kind of action taking the microbatches in order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Place,
)


class Row:
    """Words such as "F0", "I1", "B0" add the next microbatch of that kind on the rank's stage 0 or 1.

    Whole backwards and input gradients of a stage count together. "W" takes the oldest input gradient that has no
    weight gradient, of either stage, and "W0", "W1" the oldest of that stage; without one they add nothing.

    Args:
        places: the (path, stage)s that the digits stand for.
        step: by how much the microbatches of one stage rise. With 2, those of path 0 are even and those of path 1
            odd.
    """

    def __init__(self, places: Sequence[Place], *, step: int = 1) -> None:
        self.actions: list[Action] = []
        self.pairs: list[int] = []  # positions of actions that run as one with the next
        self._places = places
        self._step = step
        self._counts: Counter[tuple[str, int]] = Counter()
        self._late: deque[Action] = deque()  # input gradients without a weight gradient

    def add(self, words: str, times: int = 1) -> None:
        """Adds these words, a blank between two of them, so often."""
        for word in words.split() * max(0, times):
            kind, index = word[0], int(word[1:] or 0)
            if kind == WEIGHT_GRADIENT:
                self._add_weight(None if word == WEIGHT_GRADIENT else self._places[index])
                continue
            counted = (INPUT_GRADIENT if kind == BACKWARD else kind, index)
            path, stage = self._places[index]
            number = self._counts[counted] * self._step + (path if self._step > 1 else 0)
            self._counts[counted] += 1
            self.actions.append(Action(kind, stage, number, path))
            if kind == INPUT_GRADIENT:
                self._late.append(self.actions[-1])

    def pair(self, words: str) -> None:
        """Adds a forward and a backward that run as one."""
        self.pairs.append(len(self.actions))
        self.add(words)

    def num_forwards(self, index: int) -> int:
        """How many forwards of this stage there are so far."""
        return self._counts[FORWARD, index]

    def _add_weight(self, place: Place | None) -> None:
        for late in self._late:
            if place in (None, late.place):
                self._late.remove(late)
                self.actions.append(late._replace(kind=WEIGHT_GRADIENT))
                return
