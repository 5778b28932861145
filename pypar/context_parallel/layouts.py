"""Which positions of a sequence each rank of a context-parallel axis holds.

    contiguous   rank r holds the r-th of R equal chunks
    zigzag       rank r holds chunks r and 2R-1-r of 2R equal chunks, so that under a causal mask every rank
                 has the same work (Brandon et al., Striped Attention, arXiv 2311.09431, show the imbalance;
                 Llama 3, arXiv 2407.21783, section 3.3.2, uses this remedy)

A layout is a function (length, rank, size) -> positions in `LAYOUTS`; everything else follows from the
positions. They ascend on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import gather_replicated
from pypar.mesh import Axis, as_axis


def shard(x: Tensor, dim: int, group: Axis | dist.ProcessGroup, layout: str) -> Tensor:
    """This rank's part [.., length/R, ..] of x [.., length, ..], which is the same on every rank; contiguous.

    Differentiable: the gradient of x has this rank's rows and is zero elsewhere (sum it over the axis for
        the whole).
    ValueError: a length that the layout cannot divide, an unknown layout.
    """
    axis = as_axis(group)
    if axis.size == 1:
        positions_of(x.shape[dim], 0, 1, layout)
        return x
    return x.index_select(dim, positions_of(x.shape[dim], axis.rank, axis.size, layout).to(x.device))


def unshard(x: Tensor, dim: int, group: Axis | dist.ProcessGroup, layout: str) -> Tensor:
    """The whole [.., R*length, ..] from every rank's part x [.., length, ..], on every rank: undoes `shard`.

    Differentiable for a use that is the same on every rank: each rank gets its own rows of the gradient.
    """
    axis = as_axis(group)
    length = x.shape[dim] * axis.size
    held = [positions_of(length, rank, axis.size, layout) for rank in range(axis.size)]
    if axis.size == 1:
        return x
    place = torch.cat(held).argsort().to(x.device)
    return gather_replicated(x, axis, dim % x.dim()).index_select(dim, place)


def positions(length: int, group: Axis | dist.ProcessGroup, layout: str) -> Tensor:
    """Which positions of a sequence of `length` this rank holds: int64 [length/R], ascending, on CPU."""
    axis = as_axis(group)
    return positions_of(length, axis.rank, axis.size, layout)


def positions_of(length: int, rank: int, size: int, layout: str) -> Tensor:
    """`positions` of any rank of an axis of `size` ranks."""
    if layout not in LAYOUTS:
        close = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "use one of them"
        raise ValueError(f"sequence layout {layout!r} is not one of {', '.join(LAYOUTS)}; {hint}")
    return LAYOUTS[layout](length, rank, size)


def _contiguous(length: int, rank: int, size: int) -> Tensor:
    chunk = _chunk(length, size, "contiguous", f"the cp size ({size})")
    return torch.arange(rank * chunk, (rank + 1) * chunk)


def _zigzag(length: int, rank: int, size: int) -> Tensor:
    if size == 1:  # both halves are here: nothing to balance, so any length will do
        return torch.arange(length)
    chunk = _chunk(length, 2 * size, "zigzag", f"twice the cp size (2 x {size})")
    mirrored = 2 * size - 1 - rank
    return torch.cat(
        [
            torch.arange(rank * chunk, (rank + 1) * chunk),
            torch.arange(mirrored * chunk, (mirrored + 1) * chunk),
        ]
    )


def _chunk(length: int, num_chunks: int, layout: str, what: str) -> int:
    if length % num_chunks:
        below = length // num_chunks * num_chunks
        nearest = f"{below} or {below + num_chunks}" if below else f"{num_chunks}"
        raise ValueError(
            f"sequence length ({length}) must divide by {what} for the {layout} layout; use {nearest}, or pad"
        )
    return length // num_chunks


LAYOUTS: dict[str, Callable[[int, int, int], Tensor]] = {"contiguous": _contiguous, "zigzag": _zigzag}
