"""Saved tensors that wait for backward on the host.

A block's saved memory begins to leave when the block's forward is over, while the next one computes, and has left when
that one is over too. Backward asks for a block's tensors in the reverse order: with the first of them, what has left of
this block and of the one before it begins to come back. So what is on the device at each moment does not depend on how
fast anything is. On a CPU device and host are two accounts of the same memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pypar.arenas import Arena, Copies, Copy
from pypar.recomputation.holdings import Holdings
from pypar.recomputation.saved import Held, check_unwritten, version_of
from pypar.recomputation.saved_bytes import SavedBytes
from pypar.settings import check_whole_number, num_bytes

MIN_BYTES = 1 << 20


class Offload:
    """Moves what the blocks of a model keep to the host and back.

    min_bytes    smaller pieces of memory stay
    num_leaving  blocks whose memory may be on its way at a time: what they keep is on the device until then
    host_bytes   the most on the host; None: no bound

    Bytes are numbers, or text such as "2GB".
    """

    def __init__(
        self,
        *,
        min_bytes: int | str = MIN_BYTES,
        num_leaving: int = 1,
        host_bytes: int | str | None = None,
    ) -> None:
        check_whole_number("num_leaving", num_leaving, 1)
        self.min_bytes, self.num_leaving = num_bytes(min_bytes), num_leaving
        self.host_bytes = None if host_bytes is None else num_bytes(host_bytes)
        check_whole_number("min_bytes", self.min_bytes, 0)
        check_whole_number("host_bytes", 1 if self.host_bytes is None else self.host_bytes, 1)
        self._leaving: deque[list[Moved]] = deque()  # of each block
        self._moved: dict[int, weakref.ref[Moved]] = {}  # by the piece of memory on the device
        self._engines: dict[torch.device, tuple[Arena, Copies]] = {}
        self._last: weakref.ref[Visit] | None = None

    def visit(self, index: int) -> Visit:
        """A call of the block with this index begins."""
        visit = Visit(self, index, self._last() if self._last is not None else None)
        self._last = weakref.ref(visit)
        return visit

    def __reduce__(self) -> Any:
        """A copy of a model moves by itself, and has nothing on its way."""
        return _offload, (self.min_bytes, self.num_leaving, self.host_bytes)

    @property
    def host_now(self) -> int:
        """Bytes on the host."""
        return sum(arena.now for arena, _ in self._engines.values())

    @property
    def host_peak(self) -> int:
        """The most bytes that were on the host at once."""
        return sum(arena.peak for arena, _ in self._engines.values())

    @property
    def to_host(self) -> int:
        """Bytes that have begun to leave for the host since it was made."""
        return sum(copies.to_host for _, copies in self._engines.values())

    @property
    def to_device(self) -> int:
        """Bytes that have begun to come back."""
        return sum(copies.to_device for _, copies in self._engines.values())

    def engine(self, device: torch.device) -> tuple[Arena, Copies]:
        """Where memory of a device goes, and what carries it."""
        if device not in self._engines:
            host = Arena(
                "host (activations)", torch.device("cpu"), self.host_bytes, pinned=device.type == "cuda"
            )
            self._engines[device] = host, Copies(device)
        return self._engines[device]

    def takes(self, x: Tensor) -> bool:
        """Whether the tensor's memory is one that can be moved, and large enough."""
        return x.device.type in ("cpu", "cuda") and x.untyped_storage().nbytes() >= max(self.min_bytes, 1)

    def moved(self, x: Tensor) -> Moved:
        """The one that stands for the tensor's memory, of which several blocks may keep parts."""
        memory = x.untyped_storage()._cdata
        known = self._moved.get(memory)
        found = known() if known is not None else None
        if found is None or found.source is None or found.source.untyped_storage()._cdata != memory:
            found = Moved(self, x)
            self._moved[memory] = weakref.ref(found)
        return found

    def leave(self, pieces: Iterable[Moved]) -> None:
        """The forward of a block is over: what it keeps begins to leave, and of earlier ones it has left."""
        going = [each for each in pieces if each.leave()]
        self._leaving.append(going)
        while len(self._leaving) > self.num_leaving:
            for each in self._leaving.popleft():
                each.left()
        self._moved = {memory: ref for memory, ref in self._moved.items() if ref() is not None}

    def stay(self, pieces: Sequence[Moved]) -> None:
        """Of what is on its way the host's part is not needed: backward has come to it."""
        staying = {id(each) for each in pieces}
        for going in self._leaving:
            for each in [each for each in going if id(each) in staying]:
                going.remove(each)
                each.stay()


def _offload(min_bytes: int, num_leaving: int, host_bytes: int | None) -> Offload:
    return Offload(min_bytes=min_bytes, num_leaving=num_leaving, host_bytes=host_bytes)


def _bytes_of(x: Tensor) -> Tensor:
    """All of a tensor's memory, as bytes."""
    memory = x.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(memory, 0, (memory.nbytes(),), (1,))  # type: ignore[call-overload]


class Moved:
    """One piece of memory: on the device, on the host, or on its way.

    source: a tensor in it, as forward saved it; None once it has left.
    """

    def __init__(self, offload: Offload, x: Tensor) -> None:
        self._offload = offload
        self.source: Tensor | None = x.detach()
        self._version, self.is_written = version_of(x), False
        self.num_bytes = x.untyped_storage().nbytes()
        self._device = x.device
        self._here: Tensor | None = None  # its bytes, once they are back or on their way back
        self._coming: Copy | None = None
        self._there: tuple[Tensor, Copy] | None = None  # on the host, with the copy to there
        self._release: Callable[[], Any] | None = None  # gives that up
        self._drops: list[Callable[[], Any]] = []  # tell those who count that it has left

    def leave(self) -> bool:
        """Begin to leave; False where it has before."""
        if self._there is not None or self.source is None:
            return False
        self.check()
        host, copies = self._offload.engine(self._device)
        there = host.empty((self.num_bytes,), torch.uint8)
        copy = copies.to_host_start(there, _bytes_of(self.source))
        self._there = there, copy
        # It waits for nothing: a finalizer may run in the thread that makes the copies.
        self._release = weakref.finalize(self, host.forget, there)
        return True

    def left(self) -> None:
        """Wait until it has, and give its memory on the device up."""
        if self.source is None or self._there is None:
            return
        self._there[1].order()
        self.is_written = version_of(self.source) != self._version
        self.source = None
        for drop in self._drops:
            drop()
        self._drops = []

    def held_by(self, meter: Holdings) -> None:
        """Count it while it is on the device."""
        memory = self.source if self.source is not None else self._here
        if memory is not None:
            self._drops.append(meter.hold(self, memory))

    def stay(self) -> None:
        """Give the host's part up."""
        if self._release is not None:
            self._release()
        self._there = self._release = None

    def come(self) -> Tensor | None:
        """Begin to come back; its bytes where it has begun now."""
        if self.source is not None or self._here is not None or self._there is None:
            return None
        there, _ = self._there
        _, copies = self._offload.engine(self._device)
        self._here = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        self._coming = copies.to_device_start(self._here, there)
        return self._here

    def check(self) -> None:
        """RuntimeError where somebody has written into it."""
        if self.source is not None:
            self.is_written = version_of(self.source) != self._version

    def memory(self) -> Tensor:
        """A tensor in its memory, on the device."""
        if self.source is not None:
            return self.source
        self.come()
        if self._coming is not None:
            self._coming.wait()
            self._coming = None
            self.stay()
        assert self._here is not None
        return self._here


class View(Held):
    """A saved tensor in memory that moves."""

    def __init__(self, moved: Moved, x: Tensor) -> None:
        self.moved = moved
        self._place = x.storage_offset(), x.shape, x.stride()
        self._dtype = x.dtype
        self._shape = tuple(x.shape)

    def get(self) -> Tensor:
        self.moved.check()
        check_unwritten(self.moved.is_written, self._shape)
        memory = self.moved.memory()
        return torch.empty(0, dtype=self._dtype, device=memory.device).set_(
            memory.untyped_storage(), *self._place
        )  # type: ignore[call-overload]


class Visit:
    """One call of a block, from its forward to its backward.

    index: of the block in its model. before: the visit before it, whose backward comes after this one's if it is an
    earlier block's.
    """

    def __init__(self, offload: Offload, index: int, before: Visit | None) -> None:
        self.index, self.is_begun = index, False
        self._offload = offload
        self._before = weakref.ref(before) if before is not None and before.index < index else None
        self._pieces: list[weakref.ref[Moved]] = []
        self._counters: Sequence[SavedBytes] = ()
        self._meter: Holdings | None = None

    def close(
        self,
        pieces: Sequence[Moved],
        counters: Sequence[SavedBytes],
        meter: Holdings | None,
        *,
        stays: bool,
    ) -> None:
        """Its forward is over, which keeps this. stays: on the device, as its backward comes at once."""
        self._pieces = [weakref.ref(each) for each in pieces]
        self._counters, self._meter = counters, meter
        self._offload.leave(() if stays else pieces)

    def begin(self) -> None:
        """Backward has come to it."""
        if self.is_begun:
            return
        self.is_begun = True
        self._offload.stay(self._alive())
        before = self._before() if self._before is not None else None
        coming = [*self._alive(), *(before._alive() if before is not None and not before.is_begun else ())]
        found = {each: x for each in coming if (x := each.come()) is not None}
        for counter in self._counters:
            counter.add_all(found.values())
        if self._meter is not None:
            for each in found:
                each.held_by(self._meter)

    def _alive(self) -> list[Moved]:
        return [moved for ref in self._pieces if (moved := ref()) is not None]
