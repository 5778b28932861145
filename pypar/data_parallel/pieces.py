"""Collectives over many tensors at once, each rank with parts of its own sizes: to gather rows of weights, to sum rows.

What rank r has is a list of contiguous tensors of one dtype, rank r's pieces; every rank knows the sizes of all of
them. Pieces are read and written where they lie; what travels is their elements one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm.collectives import Handle, _all_gather, reduce_scatter_start
from pypar.comm.process_group import ProcessGroup
from pypar.comm.traffic import wire_bytes
from pypar.ops.bucket import pack, unpack
from pypar.ops.uncompiled import between_ranks

if TYPE_CHECKING:
    from pypar.mesh import Axis

Pieces = Sequence[Tensor]


@between_ranks("gather_pieces_start")
def gather_pieces_start(
    own: Pieces, parts: Sequence[Pieces], axis: Axis, flat: Tensor | None = None
) -> Handle:
    """After `wait()` parts[r] holds what rank r has in ``own``, for every rank r of the axis, this one too.

    parts[r] has as many elements as rank r's own pieces. A tensor that is in both of this rank's lists is not copied.
    The handle's tensor is the first piece.

    flat  the own pieces as one tensor, where they lie one after the other. If that is memory of `shared_empty`, at one
          place on all ranks, the others read it there, in one pass; it must not be written before the handle is done
    """
    result = own[0]
    sizes = [sum(piece.numel() for piece in part) for part in parts]
    num_bytes = sum(sizes) * result.element_size()
    if axis.size > 1:
        axis.traffic.record("all_gather", wire_bytes("all_gather", num_bytes, axis.size))
        if type(axis.group) is ProcessGroup:
            work = axis.group.gather_pieces(own if flat is None else [flat], parts)
            return Handle(result, (work,), traffic=axis.traffic)
    _copy_own(own, parts[axis.rank])
    if axis.size == 1:
        return Handle(result)
    longest = max(sizes)
    sent = result.new_zeros(longest)
    pack(own, sent)
    received = sent.new_empty(axis.size * longest)
    work = _all_gather(received, sent, group=axis.group, async_op=True)

    def finish(_: Tensor) -> Tensor:
        for rank, part in enumerate(parts):
            if rank != axis.rank:
                unpack(received[rank * longest :], part)
        return result

    return Handle(result, (work,), traffic=axis.traffic, finish=finish, keep=(sent, received))


def _copy_own(own: Pieces, part: Pieces) -> None:
    apart = [(to, x) for to, x in zip(part, own, strict=True) if to is not x]
    if apart:
        targets, sources = zip(*apart, strict=True)
        torch._foreach_copy_(list(targets), list(sources))


@between_ranks("reduce_pieces_start")
def reduce_pieces_start(parts: Sequence[Pieces], out: Pieces, axis: Axis) -> Handle:
    """After `wait()` ``out`` holds the sum over the axis of what each rank has in parts[this rank].

    parts[r] has the same sizes on all ranks. ``out`` has those of parts[this rank], and may be those tensors. Ranks'
    parts are added in the order of `reduce_scatter_start`. The handle's tensor is the first piece.
    """
    result = out[0]
    if axis.size == 1:
        _copy_own(parts[0], out)
        return Handle(result)
    if type(axis.group) is ProcessGroup:
        num_bytes = sum(piece.nbytes for part in parts for piece in part)
        axis.traffic.record("reduce_scatter", wire_bytes("reduce_scatter", num_bytes, axis.size))
        work = axis.group.reduce_pieces(parts, out)
        return Handle(result, (work,), traffic=axis.traffic)
    longest = max(sum(piece.numel() for piece in part) for part in parts)
    sent = result.new_zeros(axis.size * longest)
    for rank, part in enumerate(parts):
        pack(part, sent[rank * longest :])
    started = reduce_scatter_start(sent, axis, op=dist.ReduceOp.SUM)

    def finish(_: Tensor) -> Tensor:
        unpack(started.wait(), out)
        return result

    return Handle(result, finish=finish)
