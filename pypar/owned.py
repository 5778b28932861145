"""What a rank updates: the type that stores give, and that optimizers, gradient norms and checkpoints take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pypar.layout import Layout


@dataclass(frozen=True)
class Owned:
    """A parameter, or a part of one, that this rank updates.

    name      in the whole model
    master    fp32, what an optimizer reads and writes; always the same tensor
    gradient  fp32, of the master's shape, always the same tensor; final once the store's `reduce` has returned
    layout    which part of the whole parameter the master is
    """

    name: str
    master: Tensor
    gradient: Tensor
    layout: Layout
