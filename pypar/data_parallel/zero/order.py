"""The order in which passes enter units, by which the next one's parameters are gathered early."""

from __future__ import annotations

from pypar.data_parallel.zero.members import Unit


class Order:
    """What the last pass of one direction entered, and how far the one that runs has come.

    A pass that enters other units than the last one is as right, and gathers the next unit when it enters it.
    """

    def __init__(self) -> None:
        self._last: list[Unit] = []
        self._now: list[Unit] | None = None

    def begin(self) -> None:
        """A pass begins; one that did not end is forgotten."""
        self._now = []

    def end(self) -> None:
        """The pass has ended."""
        if self._now:
            self._last = self._now
        self._now = None

    def after(self, unit: Unit) -> Unit | None:
        """The unit that is likely to be entered after this one, which is entered now."""
        if self._now is None:  # a block alone, outside of its model's forward
            return None
        place = len(self._now)
        self._now.append(unit)
        if self._last[place : place + 1] == [unit] and place + 1 < len(self._last):
            return self._last[place + 1]
        return None
