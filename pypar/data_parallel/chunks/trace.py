"""What one step has used, moment by moment: the list of accesses that a placement is made of."""

from __future__ import annotations

from collections.abc import Hashable

from pypar.data_parallel.chunks.placement import DEVICE, HOST, READ, Access

Event = Hashable


class Trace:
    """The events of a step, each of which begins a moment; what chunks they use; what the device holds besides.

    beside  the most bytes of other things on the device, at each moment
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.beside: list[int] = []
        self._open: dict[tuple[Event, int], tuple[int, str]] = {}
        self.accesses: list[Access] = []

    def begin(self, event: Event, beside: int) -> int:
        """A moment begins; returns its number."""
        self.events.append(event)
        self.beside.append(beside)
        return len(self.events) - 1

    def holds(self, beside: int) -> None:
        """The device holds so many bytes of other things now."""
        if self.beside:
            self.beside[-1] = max(self.beside[-1], beside)

    def use(self, user: Event, chunk: int, kind: str) -> None:
        """The device uses a chunk from this moment on."""
        self._open[user, chunk] = (len(self.events) - 1, kind)

    def release(self, user: Event, chunk: int) -> None:
        """The moment that begins now is the first one without this use."""
        begun = self._open.pop((user, chunk), None)
        if begun is not None:
            moment, kind = begun
            self.accesses.append(Access(moment, chunk, DEVICE, kind, len(self.events) - 2))

    def on_host(self, chunk: int, kind: str = READ) -> None:
        """The host uses a chunk in this moment."""
        self.accesses.append(Access(len(self.events) - 1, chunk, HOST, kind))
