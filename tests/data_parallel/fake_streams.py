"""Streams of a device that does not exist: vector clocks say what happens before what.

Each stream counts what is queued on it. Its clock says, for every stream, how much of that one's queue is over
before this stream's next operation begins. An access that is not ordered after an earlier one of the same memory,
where one of the two writes, is a race: on a real device it may read half of a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pypar.comm import Handle

Clock = dict[str, int]


class RaceError(AssertionError):
    """Two accesses of one memory without an order."""


class FakeStreams:
    """`DeviceStreams` of pypar.data_parallel.streams, and the accesses that its user declares."""

    device_type = "cpu"  # where the tensors that stand for a device's are

    def __init__(self) -> None:
        self._current = "main"
        self._clocks: dict[str, Clock] = {}
        self._accesses: list[tuple[range, str, int, bool, str]] = []
        self.kept: dict[int, set[str]] = {}
        self.num_waits = 0

    # ---- what the code under test calls

    def current(self, device: object = None) -> str:
        return self._current

    def record(self, stream: str, event: Clock | None) -> Clock:
        event = {} if event is None else event
        event.clear()
        event.update(self._clock(stream))
        return event

    def wait(self, stream: str, event: Clock) -> None:
        self.num_waits += 1
        clock = self._clock(stream)
        for other, tick in event.items():
            clock[other] = max(clock.get(other, 0), tick)

    def keep(self, tensor: Tensor, stream: str) -> None:
        self.kept.setdefault(tensor.untyped_storage().data_ptr(), set()).add(stream)

    # ---- what tests call

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        """Work in here is queued on `stream`."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def order(self, first: str, then: str) -> None:
        """What the user does between streams of his: `then` waits for what `first` has queued."""
        self.wait(then, dict(self._clock(first)))

    def reads(self, tensor: Tensor, what: str, stream: str | None = None) -> None:
        self._access(tensor, False, what, stream or self._current)

    def writes(self, tensor: Tensor, what: str, stream: str | None = None) -> None:
        self._access(tensor, True, what, stream or self._current)

    def free(self, tensor: Tensor, taken_on: str) -> None:
        """The allocator hands the memory to the next who asks on `taken_on`, who writes it at once; it first waits
        for the streams that it was told about.
        """
        for stream in sorted(self.kept.get(tensor.untyped_storage().data_ptr(), set())):
            self.wait(taken_on, dict(self._clock(stream)))
        self._access(tensor, True, "the memory's next owner", taken_on)

    def _clock(self, stream: str) -> Clock:
        return self._clocks.setdefault(stream, {})

    def _access(self, tensor: Tensor, is_write: bool, what: str, stream: str) -> None:
        clock = self._clock(stream)
        memory = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for other_memory, other, tick, wrote, before in self._accesses:
            overlap = memory.start < other_memory.stop and other_memory.start < memory.stop
            if overlap and (is_write or wrote) and clock.get(other, 0) < tick:
                raise RaceError(f"{what} on stream {stream} does not wait for {before} on stream {other}")
        clock[stream] = clock.get(stream, 0) + 1
        self._accesses.append((memory, stream, clock[stream], is_write, what))


class FakeNccl:
    """all_reduce_start as NCCL does it: on a stream of its own, which waits for the current one and for no other;
    `wait()` makes the stream that is then current wait.
    """

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self.is_waited_for = True  # False plants a fault

    def all_reduce_start(self, x: Tensor, *_: Any) -> Handle:
        streams = self._streams
        streams.order(streams.current(), "nccl")
        streams.writes(x, "the reduction", "nccl")
        return _Started(x, streams if self.is_waited_for else None)


class _Started(Handle):
    __slots__ = ("_streams",)

    def __init__(self, x: Tensor, streams: FakeStreams | None) -> None:
        super().__init__(x)
        self._streams = streams

    def wait(self) -> Tensor:
        if self._streams is not None:
            self._streams.order("nccl", self._streams.current())
        return super().wait()
