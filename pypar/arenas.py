"""Memory of a device and of the host beside it: what is taken from each is counted, and copies go on in the background.

On a GPU the host's memory is pinned, and copies run on a stream of their own. On a CPU the two are accounts of the same
memory: budgets, moves and their order are those of a GPU run, and a thread makes the copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class OverBudgetError(MemoryError):
    """More was asked of an arena than its budget leaves."""


class Arena:
    """Memory of one kind, a device's or the host's, of which every byte that is taken is counted.

    name          as errors say it: "device", "host"
    device        where its tensors lie
    budget_bytes  the most that may be taken at once; None: no bound
    pinned        pages that a GPU copies from and to beside computing
    """

    def __init__(
        self, name: str, device: torch.device, budget_bytes: int | None = None, *, pinned: bool = False
    ) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise ValueError(
                f"the budget of the {name} arena ({budget_bytes} bytes) must not be negative; None is no bound"
            )
        self.name, self.device, self.budget_bytes, self.pinned = (
            name,
            torch.device(device),
            budget_bytes,
            pinned,
        )
        self.now = self.peak = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values, in memory of its own. OverBudgetError where the budget does not leave it."""
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        self.count(num_bytes)
        try:
            return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self.pinned)
        except BaseException:
            self.count(-num_bytes)
            raise

    def bring(self, x: Tensor) -> None:
        """Give a tensor that `free` has emptied its memory again, without values; it must be all of its storage."""
        if not x.untyped_storage().size():
            self.count(x.nbytes)
            x.untyped_storage().resize_(x.nbytes)

    def free(self, x: Tensor) -> None:
        """Give the memory of a tensor of this arena back: its storage has no bytes from now on."""
        storage = x.untyped_storage()
        self.count(-storage.size())
        storage.resize_(0)

    def forget(self, x: Tensor) -> None:
        """Count a tensor of this arena no more; its memory goes with the last that holds it, a copy under way too."""
        self.count(-x.untyped_storage().size())

    def count(self, num_bytes: int) -> None:
        """Bytes that something else has taken from this memory, or given back where negative.

        OverBudgetError, and nothing is counted, where the budget does not leave them.
        """
        after = self.now + num_bytes
        if num_bytes > 0 and self.budget_bytes is not None and after > self.budget_bytes:
            raise OverBudgetError(
                f"the {self.name} arena holds {self.now:,} bytes of its budget of {self.budget_bytes:,}, and "
                f"{num_bytes:,} more do not fit; raise the budget by {after - self.budget_bytes:,} bytes or more, or "
                "keep less there"
            )
        assert after >= 0, f"{-num_bytes} bytes given back to the {self.name} arena, which has {self.now}"
        self.now = after
        self.peak = max(self.peak, after)

    def reset_peak(self) -> None:
        """Let the peak be what is taken now."""
        self.peak = self.now


class Copy:
    """A copy that has been started."""

    def __init__(self, source: Tensor, done: Future[None] | torch.cuda.Event, *, to_host: bool) -> None:
        self._source: Tensor | None = source  # which must not go, nor change, before
        self._done, self._to_host = done, to_host

    @property
    def is_over(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done.done() if isinstance(self._done, Future) else self._done.query()

    def order(self) -> None:
        """What the caller's stream does from now on comes after the copy; the host waits only where it is a CPU's."""
        if isinstance(self._done, Future):
            self._done.result()
        else:
            torch.cuda.current_stream().wait_event(self._done)
        self._source = None

    def wait(self) -> None:
        """Return when the copy may be read, and its source overwritten, by what the caller does from now on."""
        if self._to_host and not isinstance(self._done, Future):
            self._done.synchronize()  # the host reads it
        self.order()


class Copies:
    """Copies between the arenas of a device, made one after the other in the order of their starts.

    to_host, to_device: bytes that have been started in each direction.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self.to_host = self.to_device = 0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._thread: ThreadPoolExecutor | None = None

    def to_host_start(self, into: Tensor, source: Tensor) -> Copy:
        """Begin to copy a tensor of the device to one of the host, of its shape; dtypes may differ."""
        self.to_host += into.nbytes
        return self._start(into, source, to_host=True)

    def to_device_start(self, into: Tensor, source: Tensor) -> Copy:
        """Begin to copy a tensor of the host to one of the device, of its shape; dtypes may differ."""
        self.to_device += into.nbytes
        return self._start(into, source, to_host=False)

    def _start(self, into: Tensor, source: Tensor, *, to_host: bool) -> Copy:
        assert into.shape == source.shape, f"{tuple(into.shape)} is not {tuple(source.shape)}"
        into, source = into.detach(), source.detach()
        if self._stream is None:
            return Copy(source, self._own_thread().submit(_copy, into, source), to_host=to_host)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        for x in (into, source):
            if x.is_cuda:
                x.record_stream(self._stream)
        return Copy(source, done, to_host=to_host)

    def _own_thread(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="pypar-copies")
            weakref.finalize(self, self._thread.shutdown, wait=False)
        return self._thread

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("copies that are under way cannot be pickled; make Copies where they are needed")


@torch.no_grad()
def _copy(into: Tensor, source: Tensor) -> None:
    into.copy_(source)
