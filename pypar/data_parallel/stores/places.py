"""Where this rank's rows of parameters and gradients lie: what a gather reads, and what a reduction writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from pypar.arenas import Arena

if TYPE_CHECKING:
    from pypar.data_parallel.chunks.places import Chunks
    from pypar.data_parallel.zero.members import Group, Unit


class Places(Protocol):
    """Brings rows to the device that a collective reads or writes, and takes them away.

    The tensors of members (share, master, gradient) are those at home, which an optimizer and checkpoints read and
    write between steps. What comes back here lies on the device until it is said to be done with.
    """

    keeps_rows: bool  # shares have memory of their own at every stage
    optimizer: torch.optim.Optimizer | None  # whose states go where masters go

    @property
    def count(self) -> Callable[[int], None] | None:
        """Takes bytes of the device that were taken, or given back where negative, by other things than rows."""
        ...

    def begin(self, units: Sequence[Unit], *, most_bytes: int, is_cut: bool) -> None:
        """The store is made. is_cut: parameters that are not trained are cut over ranks too."""
        ...

    def rows(self, group: Group, *, publishes: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Rows of parameters to gather, and as one tensor where they lie so in memory that other ranks read.

        publishes: they have been updated, and become parameters that are whole always.
        """
        ...

    def rows_sent(self, group: Group) -> None:
        """The gather is over."""
        ...

    def sums(self, group: Group, *, adds: bool) -> list[Tensor]:
        """Rows of gradients that a reduction writes; adds: they hold a sum of this step already, which is read."""
        ...

    def sums_made(self, group: Group) -> None:
        """The reduction is over."""
        ...

    def settle(self) -> None:
        """Gradients at home are final, and are read and written there from now on; so are masters."""
        ...

    def zeroed(self) -> None:
        """Gradients at home are zero: what the device has of them is nothing."""
        ...

    def changed(self) -> None:
        """Shares at home have other values."""
        ...

    def end_step(self) -> None:
        """Masters were updated and published."""
        ...

    def restart(self) -> None:
        """A pass has failed: nothing is in use any more."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Inside, what happens is not of the steps that repeat."""
        ...


class Here:
    """Everything is on the device always."""

    keeps_rows = False
    count = None

    def __init__(self) -> None:
        self.optimizer: torch.optim.Optimizer | None = None

    def begin(self, units: Sequence[Unit], *, most_bytes: int, is_cut: bool) -> None:
        pass

    def rows(self, group: Group, *, publishes: bool = False) -> tuple[list[Tensor], Tensor | None]:
        return group.shares(), group.flat

    def sums(self, group: Group, *, adds: bool) -> list[Tensor]:
        return group.sums()

    def rows_sent(self, group: Group) -> None:
        pass

    sums_made = rows_sent

    def settle(self) -> None:
        pass

    zeroed = changed = end_step = restart = settle

    def aside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def places_for(offload: str, device_bytes: int | None, models: Sequence[nn.Module]) -> Here | Chunks:
    """The places that `pypar.zero` is told."""
    if offload == "none":
        return Here()
    from pypar.data_parallel.chunks.places import Chunks

    device = next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
    host = Arena("host", torch.device("cpu"), pinned=device.type == "cuda")
    return Chunks(Arena("device", device, device_bytes), host)
