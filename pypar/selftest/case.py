"""What an operator's file of cases says: inputs, our call, the same in plain PyTorch, and torch's fast function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Draw:
    """Random inputs, the same numbers on every machine: drawn on the CPU, rounded, then moved."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, fp32: bool = False) -> Tensor:
        """Standard normal, of the case's dtype or fp32."""
        x = torch.randn(shape, generator=self._generator)
        return x.to(torch.float32 if fp32 else self.dtype).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """fp32 in [0, 1)."""
        return torch.rand(shape, generator=self._generator).to(self.device)

    def whole(self, limit: int, *shape: int) -> Tensor:
        """int64 in [0, limit)."""
        return torch.randint(0, limit, shape, generator=self._generator).to(self.device)

    def numbers(self, *values: int) -> Tensor:
        """These, as int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Peer:
    """torch's function for the same work. `prepare` makes its inputs of the case's, outside of the timing."""

    name: str
    call: Function
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs


@dataclass(frozen=True)
class Case:
    """One thing that an operator can do, at one size.

    inputs: makes the arguments; those that `gradients` names are differentiated; none: only forward is run.
    ours(**inputs, backend=name), plain(**inputs) -> outputs; plain computes in the dtype of its inputs, float64 too.
    flops: (forward, backward) additions and multiplications that cannot be avoided; 0 for those that only move data.
    unread: inputs that backward has no need to read, for counting the bytes that must move.
    """

    name: str
    shape: str
    inputs: Callable[[Draw], Inputs]
    gradients: tuple[str, ...]
    ours: Function
    plain: Function
    peer: Peer
    flops: tuple[float, float] = (0.0, 0.0)
    unread: tuple[str, ...] = ()
    quick: bool = False
