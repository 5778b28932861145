"""What the blocks of a model hold, counted by who holds it: memory that others keep alive too is theirs then."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor


class Holdings:
    """Bytes that objects hold, each piece of memory once, and the most at once: ``now`` and ``peak``."""

    def __init__(self) -> None:
        self._holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def hold(self, holder: object, x: Tensor) -> Any:
        """An object holds a tensor's memory, until it is gone or what is returned is called."""
        memory = x.untyped_storage()
        self.now += 0 if self._holders[memory._cdata] else memory.nbytes()
        self._holders[memory._cdata] += 1
        self.peak = max(self.peak, self.now)
        return weakref.finalize(holder, self._drop, memory._cdata, memory.nbytes())

    def _drop(self, memory: int, num_bytes: int) -> None:
        self._holders[memory] -= 1
        if not self._holders[memory]:
            del self._holders[memory]
            self.now -= num_bytes
