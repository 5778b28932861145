"""Who holds parameters, gradients and what an optimizer updates: the protocol of all stores.

A training step is one order of calls, whatever the store:

    store.zero()
    with store.accumulate(): ...            # backward of all microbatches but the last
    ...                                     # backward of the last one, beside which gradients are reduced
    store.reduce()                          # gradients of what this rank owns are final
    optimizer.step(lr, norm)                # masters are updated
    store.publish()                         # updated masters become what the next forward reads
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from pypar.blocks import Block
from pypar.mesh import Axis
from pypar.owned import Owned


class Store(Protocol):
    """What a store does; `Replicated` is one of which every rank holds all."""

    @property
    def axes(self) -> list[Axis]:
        """The axes over which it communicates."""
        ...

    def owned(self) -> list[Owned]:
        """What this rank updates, the same list each time. Over all ranks: everything that is trained."""
        ...

    @property
    def acts_on_blocks(self) -> bool:
        """Whether `enter` and `leave` are to be called; see `pypar.data_parallel.stores.around_blocks`."""
        ...

    def enter(self, block: Block) -> None:
        """Before a block's forward or backward: make its parameters ready to compute with."""
        ...

    def leave(self, block: Block) -> None:
        """After it: what `enter` brought may go."""
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, backward adds to the gradients and starts no reduction."""
        ...

    def reduce(self) -> None:
        """Wait until the gradients of all that is owned are sums over their layouts' axes. Every rank calls it."""
        ...

    def publish(self) -> None:
        """Let parameters be what the masters are, rounded to the parameters' dtypes. Every rank calls it."""
        ...

    def zero(self) -> None:
        """Set all gradients to zero."""
        ...
