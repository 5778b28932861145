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
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pypar.blocks import Block
from pypar.layout import Layout
from pypar.mesh import Axis, Mesh
from pypar.owned import Owned


class Store(Protocol):
    """What a store does; `Replicated` is one of which every rank holds all."""

    @property
    def mesh(self) -> Mesh:
        """The mesh that has all axes which the layouts of `owned` name."""
        ...

    @property
    def axes(self) -> list[Axis]:
        """The axes over which it communicates."""
        ...

    def owned(self) -> list[Owned]:
        """What this rank updates, the same list each time. Over all ranks: everything that is trained."""
        ...

    def frozen(self) -> dict[str, tuple[Tensor, Layout]]:
        """What is not trained: name -> this rank's part, and which one that is, for checkpoints."""
        ...

    def holds_states_of(self, optimizer: torch.optim.Optimizer) -> None:
        """The states of an optimizer of what is owned may go where the store puts masters."""
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


@runtime_checkable
class ActsOnBlocks(Protocol):
    """A store that brings parameters and takes them away; `pypar.data_parallel.stores.around_blocks` calls it.

    One block more than the model's stands for all of a forward or backward: the root, which has no modules.
    """

    def enter(self, block: Block, *, backward: bool = False) -> None:
        """Before a block's forward or backward: make its parameters ready to compute with."""
        ...

    def leave(self, block: Block, *, backward: bool = False, returns: bool = False) -> None:
        """After it: what `enter` brought may go. ``returns``: the backward of this forward may come."""
        ...

    def abandon(self) -> None:
        """A backward has ended with an error: let go of what it brought."""
        ...
