"""Ranks that communicate inside blocks choose the same: they plan by the most bytes and seconds of any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from pypar.axis import Axis
from pypar.comm.collectives import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.recomputation.plan.costs import BlockCosts, Copying


def agreed(
    blocks: Sequence[BlockCosts], copying: Copying, device: torch.device, axis: Axis | None
) -> tuple[list[BlockCosts], Copying]:
    """The same on all ranks of the axis, which all call it. RuntimeError, on all: their blocks are not alike."""
    if axis is None or axis.size == 1:
        return list(blocks), copying
    kinds = [(len(b.calls_s), *((p.name, p.call, p.until) for p in b.pieces)) for b in blocks]
    if first_difference([(repr(kinds), torch.empty(0, device=device))], axis, values=False) is not None:
        raise RuntimeError(
            f"the ranks of {axis.name} call other operators in their blocks, so that no plan of activations is one for "
            "all of them; use recompute.policy instead"
        )
    numbers = [1 / copying.bytes_per_s, copying.own_share, float(copying.moves)]
    for block in blocks:
        numbers += [*block.calls_s, *block.between_s, block.forward_s, block.backward_s]
        for piece in block.pieces:
            numbers += [piece.saved_bytes, piece.extra_bytes, piece.moved_bytes]
    packed = torch.tensor(numbers, dtype=torch.float64, device=device)
    most = iter(all_reduce_start(packed, axis, dist.ReduceOp.MAX).wait().tolist())
    copying = Copying(1 / next(most), next(most), bool(next(most)))
    return [_filled(block, most) for block in blocks], copying


def _filled(block: BlockCosts, most: Iterator[float]) -> BlockCosts:
    calls_s = tuple(next(most) for _ in block.calls_s)
    between_s = tuple(next(most) for _ in block.between_s)
    forward_s, backward_s = next(most), next(most)
    pieces = tuple(
        replace(piece, saved_bytes=int(next(most)), extra_bytes=int(next(most)), moved_bytes=int(next(most)))
        for piece in block.pieces
    )
    return replace(
        block, pieces=pieces, calls_s=calls_s, between_s=between_s, forward_s=forward_s, backward_s=backward_s
    )
