"""Counting the bytes that autograd keeps between a forward and its backward."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _Thread(threading.local):
    counters: tuple[SavedBytes, ...] = ()


_thread = _Thread()


class SavedBytes:
    """Counts what autograd keeps of the forwards inside, each piece of memory once.

        with SavedBytes(model) as saved:
            loss = model(tokens)
        saved.num_bytes             # until the backward: falls as it goes on
        loss.backward()
        saved.peak_bytes            # the most at once: what recomputed blocks make again counts as long as it is there

    The memory of the model's parameters and buffers does not count. It is exact: every saved tensor is seen, with the
    whole of the memory that it keeps alive, and what recomputed blocks keep. Attributes that a
    torch.autograd.Function puts on its ctx by itself are not seen.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        self._stays = {x.untyped_storage()._cdata for x in tensors}
        # A weak reference keeps the address of a piece of memory from being given to another.
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = self._bound = 0  # bytes: the most seen; no less than there can be now
        self._hooks = saved_tensors_hooks(self._save, lambda x: x)

    def __enter__(self) -> SavedBytes:
        self._before = _thread.counters
        _thread.counters = (*self._before, self)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        _thread.counters = self._before

    @property
    def num_bytes(self) -> int:
        """Of what is still there."""
        self._found = {key: each for key, each in self._found.items() if not each[0].expired()}
        self._bound = sum(num_bytes for _, num_bytes in self._found.values())
        return self._bound

    @property
    def peak_bytes(self) -> int:
        """The most at once so far."""
        return self._most

    def _save(self, x: Tensor) -> Tensor:
        self.add(x)
        return x.detach()

    def add(self, x: Tensor) -> None:
        """Count the memory of a tensor."""
        self.add_all((x,))

    def add_all(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors that are there at one time."""
        for x in tensors:
            storage = x.untyped_storage()
            if storage._cdata not in self._stays:
                before = self._found.get(storage._cdata)
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._bound += storage.nbytes() - (before[1] if before is not None else 0)
        if self._bound > self._most:
            self._most = max(self._most, self.num_bytes)


def counters() -> tuple[SavedBytes, ...]:
    """Those of this thread, which are to hear of tensors that are kept and that their hooks do not see."""
    return _thread.counters
