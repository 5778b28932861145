"""The forward of a region that runs again in backward, until it has made what is still needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pypar.recomputation.operators import Instead
from pypar.recomputation.saved import SAME, Result, Slot


class EnoughError(BaseException):
    """Ends a forward that runs again; no Exception, as a model may catch those."""


@dataclass
class LastCall:
    """The last operator that was called: which of the tensors saved since are its inputs.

    Where all that are still needed are, nobody needs its outputs, and the second time it is not computed.
    """

    number: int = -1
    inputs: dict[Any, int] = field(default_factory=dict)
    alive: list[Tensor] = field(
        default_factory=list
    )  # the inputs, whose memory may not be another's meanwhile
    slots: dict[int, int] = field(default_factory=dict)  # number of the slot -> of the input
    is_enough: bool = True


class First(Protocol):
    """What is known of the first forward."""

    name: str
    last_call: LastCall

    def kept(self, call: int) -> Result | None:
        """What is kept of a call."""
        ...


class Again:
    """The listener and the hook of a forward that runs again."""

    def __init__(self, first: First, wanted: dict[int, Slot]) -> None:
        self._first, self.wanted = first, wanted
        self.num_saved = self._num_calls = 0
        self.is_computing = False

    def save(self, x: Tensor) -> Tensor:
        slot = self.wanted.get(self.num_saved)
        if slot is not None:
            slot.take(x)
            del self.wanted[self.num_saved]
            if not self.wanted:
                raise EnoughError
        self.num_saved += 1
        return x.detach()

    def call(self, name: str, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
        if self.is_computing:
            return compute()
        last = self._first.last_call
        if self._num_calls == last.number and last.is_enough and all(n in last.slots for n in self.wanted):
            for n, slot in self.wanted.items():
                slot.take(inputs[last.slots[n]])
            self.wanted = {}
            raise EnoughError
        kept = self._kept(name)
        return self._computed(compute) if kept is None else kept.again()

    def written(self, x: Tensor) -> None:
        """Of no interest."""

    def call_under_autograd(self, name: str, compute: Callable[[], Any]) -> Any:
        if self.is_computing:
            return compute()
        kept = self._kept(name)
        with contextlib.nullcontext() if kept is None else Instead(kept.again()):
            return self._computed(compute)

    def _computed(self, compute: Callable[[], Any]) -> Any:
        self.is_computing = True
        try:
            return compute()
        finally:
            self.is_computing = False

    def _kept(self, name: str) -> Result | None:
        """What the forward kept of the call that is due, None where it kept nothing."""
        kept = self._first.kept(self._num_calls)
        self._num_calls += 1
        if kept is not None and kept.name != name:
            raise RuntimeError(
                f"{self._first.name} called {name} in backward where its forward called {kept.name}; {SAME}"
            )
        return kept
