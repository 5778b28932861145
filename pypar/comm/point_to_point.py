"""Started sends and receives between ranks of an axis, one by one or several as one batch.

All go through `batch_isend_irecv`. Messages between the same two ranks with the same tag arrive in the order
in which they were started. A buffer that is being sent must not be written until its handle was waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm.collectives import Handle
from pypar.ops.uncompiled import between_ranks

if TYPE_CHECKING:
    from pypar.mesh import Axis


@between_ranks("send_start")
def send_start(x: Tensor, peer_index: int, axis: Axis, tag: int = 0) -> Handle:
    """Start sending x [any shape] to the rank with index peer_index on the axis; `wait()` returns x."""
    peer = _peer(peer_index, axis, "send to")
    source = x.detach().contiguous()
    axis.traffic.record("send", source.nbytes)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, source, peer, axis.group, tag)])
    return Handle(x, tuple(works), traffic=axis.traffic, keep=(source,))


@between_ranks("receive_start")
def receive_start(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    peer_index: int,
    axis: Axis,
    tag: int = 0,
) -> Handle:
    """Start receiving from the rank with index peer_index on the axis; `wait()` gives a new tensor."""
    peer = _peer(peer_index, axis, "receive from")
    buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
    axis.traffic.record("receive", 0)
    works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, buffer, peer, axis.group, tag)])
    return Handle(buffer, tuple(works), traffic=axis.traffic)


@between_ranks("exchange_start")
def exchange_start(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], axis: Axis, tag: int = 0
) -> tuple[list[Handle], list[Handle]]:
    """Start several sends (x, index of the receiver) and receives (buffer, index of the sender) as one batch.

    Every rank that takes part starts its share of the same batches in the same order. Returns handles of the sends
    and of the receives; waiting for one that received gives its buffer, which is contiguous.
    """
    to = [_peer(index, axis, "send to") for _, index in sends]
    sources = [x.detach().contiguous() for x, _ in sends]
    if not sends and not receives:
        return [], []
    axis.traffic.record("exchange", sum(x.nbytes for x in sources))
    operations = [
        dist.P2POp(dist.irecv, buffer, _peer(index, axis, "receive from"), axis.group, tag)
        for buffer, index in receives
    ]
    operations += [
        dist.P2POp(dist.isend, x, peer, axis.group, tag) for x, peer in zip(sources, to, strict=True)
    ]
    works = dist.batch_isend_irecv(operations)
    if len(works) < len(operations):  # NCCL has one for the whole batch
        works = works * len(operations)
    handles = [
        Handle(operation.tensor, (work,), traffic=axis.traffic, keep=(operation.tensor,))
        for operation, work in zip(operations, works, strict=False)
    ]
    return handles[len(receives) :], handles[: len(receives)]


def _peer(peer_index: int, axis: Axis, what: str) -> int:
    """The global rank of an index on the axis."""
    if not 0 <= peer_index < axis.size or peer_index == axis.rank:
        others = [index for index in range(axis.size) if index != axis.rank]
        remedy = f"use one of {others}" if others else "there is no other rank to talk to"
        raise ValueError(
            f"index {axis.rank} cannot {what} index {peer_index} of axis {axis.name!r}, which has size "
            f"{axis.size}; {remedy}"
        )
    return axis.ranks[peer_index]
