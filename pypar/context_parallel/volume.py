"""Bytes that each rank sends: formulas of shapes, layout and mask, for all methods. Tests hold counters to them.

With K the bytes of one rank's k and v and D the bytes of their gradients in fp32, a ring of R ranks whose mask
hides nothing sends (R-1) K forward and (R-2) K + (R-1) D backward on every rank. With contiguous chunks and a
causal mask rank r sends (r+1) K forward, the last one nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pypar.context_parallel.agreement import agreement_bytes as agreement_bytes
from pypar.context_parallel.layouts import Segments, num_positions
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.route import KEYS, Transfer, route


@dataclass(frozen=True)
class Sizes:
    """batch size B (1 with documents), N query heads, G key/value heads, head sizes H and Hv, dtype of q, k and v."""

    B: int
    N: int
    G: int
    H: int
    Hv: int
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """In which gradients travel."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def keys_bytes(self, positions: int) -> int:
        """Of k and v together."""
        return self.B * positions * self.G * (self.H + self.Hv) * self.dtype.itemsize

    def sums_bytes(self, positions: int) -> int:
        """Of dk and dv as they travel."""
        return self.B * positions * self.G * (self.H + self.Hv) * self.wide.itemsize


@dataclass(frozen=True)
class Volume:
    """Bytes sent by each rank, by rank, without the check that the ranks agree (`agreement_bytes`)."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


def ring(sizes: Sizes, queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask) -> Volume:
    """queries, keys: what each rank holds, by rank."""
    table = route(queries, keys, mask)

    def sent(rounds: tuple[tuple[Transfer, ...], ...]) -> tuple[int, ...]:
        totals = [0] * len(keys)
        for transfers in rounds:
            for transfer in transfers:
                positions = num_positions(keys[transfer.source])
                size = sizes.keys_bytes if transfer.kind == KEYS else sizes.sums_bytes
                totals[transfer.sender] += size(positions)
        return tuple(totals)

    return Volume(sent(table.forward), sent(table.backward))
