"""What a started collective returns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.ops.uncompiled import uncompiled_class

IN_FLIGHT = "it reads and writes memory while other ranks do"


@uncompiled_class(IN_FLIGHT)
class Work(dist._Work):  # type: ignore[name-defined, misc]
    """A started collective or message."""

    def __init__(
        self, group: Any, works: list, result: list[Tensor], finish: Callable[[], None] | None, alive: Any
    ) -> None:
        super().__init__()
        self._group, self._works, self._result, self._finish = group, works, result, finish
        self._alive = alive  # tensors that are in use
        self._source = -1
        self._future: torch.futures.Future | None = None
        self._lock = threading.Lock()
        self._error: Exception | None = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Returns when the result is there; RuntimeError where it cannot come."""
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else 0.0
        with self._lock:
            if self._error is not None:
                raise self._error
            try:
                while self._works:
                    self._group.native.wait(self._works[0], max(seconds, 0.0))
                    self._source = self._works[0].peer
                    self._works.pop(0)
                if self._finish is not None:
                    self._finish()
                    self._finish = None
            except Exception as error:
                self._error, self._works = error, []
                raise
        return True

    def is_completed(self) -> bool:
        return self._error is not None or all(self._group.native.is_done(work) for work in list(self._works))

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> list[Tensor]:
        return self._result

    def synchronize(self) -> None:
        self.wait()

    def _source_rank(self) -> int:
        return self._source

    source_rank = _source_rank

    def get_future(self) -> torch.futures.Future:
        """Completed in the background."""
        if self._future is None:
            self._future = torch.futures.Future()
            self._group.complete_later(self)
        return self._future


@uncompiled_class(IN_FLIGHT)
class FinishedWork(dist._Work):  # type: ignore[name-defined, misc]
    """A collective that ran before its call returned."""

    def __init__(self, result: list[Tensor]) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    is_completed = is_success = wait

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._result

    def synchronize(self) -> None:
        pass

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._result)
        return future


@uncompiled_class(IN_FLIGHT)
class ThreadWork(dist._Work):  # type: ignore[name-defined, misc]
    """A collective that the group's own thread runs."""

    def __init__(self, running: Future, result: list[Tensor]) -> None:
        super().__init__()
        self._running, self._result = running, result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._running.result(timeout.total_seconds() or None)
        return True

    def is_completed(self) -> bool:
        return self._running.done()

    def is_success(self) -> bool:
        return self._running.done() and self._running.exception() is None

    def exception(self) -> BaseException | None:
        return self._running.exception() if self._running.done() else None

    def result(self) -> list[Tensor]:
        return self._result

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()

        def complete(running: Future) -> None:
            error = running.exception()
            if error is None:
                future.set_result(self._result)
            else:
                future.set_exception(error)

        self._running.add_done_callback(complete)
        return future


def complete(works: queue.SimpleQueue) -> None:
    """Sets the futures of works, in their order, up to None."""
    while (work := works.get()) is not None:
        try:
            work.wait()
        except Exception as error:
            work.get_future().set_exception(error)
        else:
            work.get_future().set_result(work.result())
