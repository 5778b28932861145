"""Calls of operators under autograd, which a listener of this thread may answer itself.

Recomputation listens: it gives again what it kept of an operator's first call, and does not compute what nobody needs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


class Listener(Protocol):
    """What hears of every call in its thread."""

    def call(self, name: str, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The outputs of the operator `name`, tensors and tuples of them: compute(), or other tensors like them."""
        ...

    def call_under_autograd(self, name: str, compute: Callable[[], Any]) -> Any:
        """The same for a product of two matrices by torch, whose operators save for backward what they need."""
        ...


class _Thread(threading.local):
    listener: Listener | None = None


_thread = _Thread()


def called(name: str, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
    """compute(), or what this thread's listener answers.

    For the forward of a torch.autograd.Function, with the inputs of which it may save some for its backward. The
    outputs must be what the forward returns or saves, and the listener may raise what ends the forward.
    """
    listener = _thread.listener
    return compute() if listener is None else listener.call(name, inputs, compute)


def called_under_autograd(name: str, compute: Callable[[], Any]) -> Any:
    """`called` for a function that is no torch.autograd.Function: one product of two matrices, by torch."""
    listener = _thread.listener
    return compute() if listener is None else listener.call_under_autograd(name, compute)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, the listener hears of this thread's calls, and no other does."""
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before


def has_listener() -> bool:
    """Whether somebody listens in this thread."""
    return _thread.listener is not None
