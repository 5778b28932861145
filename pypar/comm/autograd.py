"""Collectives that autograd can differentiate, in pairs: each one's backward is the other one's forward.

                      forward           backward
    copy_to           identity          all_reduce        reduce_from        all_reduce       identity
    gather_from       all_gather        reduce_scatter    reduce_scatter_to  reduce_scatter   all_gather
    split_to          local slice       all_gather        gather_replicated  all_gather       local slice

The first of each pair on the left of a parallel region, the second on its right (Megatron-LM's f and g, arXiv
1909.08053; sequence parallelism's g and g-bar, arXiv 2205.05198). `gather_from` is for an output that each
rank then uses in a different way (gradients differ and are summed); `gather_replicated` for one that all
ranks use in the same way (gradients are equal).

No function writes into its input or into a gradient that it receives: autograd may have lent that tensor to
others too. All may be differentiated twice. On an axis of size 1 each returns its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from pypar.comm.collectives import all_gather_start, all_reduce_start, local_slice, reduce_scatter_start
from pypar.ops.uncompiled import between_ranks, uncompiled

if TYPE_CHECKING:
    from pypar.mesh import Axis


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """x [any shape], the same on every rank, used in a different way on each: gradients are summed."""
    return _apply(_copy, _sum, x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis of x [any shape], whose use is the same on every rank."""
    return _apply(_sum, _copy, x, axis)


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' x [.., n, ..] along dim as [.., R*n, ..], used in a different way on each rank."""
    return _apply(_gather, _scatter, x, axis, dim)


def reduce_scatter_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part [.., n, ..] along dim of the sum over the axis of x [.., R*n, ..]."""
    return _apply(_scatter, _gather, x, axis, dim)


def split_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part [.., n, ..] along dim of x [.., R*n, ..], which is the same on every rank."""
    return _apply(_slice, _gather, x, axis, dim)


def gather_replicated(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' x [.., n, ..] along dim as [.., R*n, ..], used in the same way on each rank."""
    return _apply(_gather, _slice, x, axis, dim)


def _copy(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce_start(x.clone(memory_format=torch.contiguous_format), axis).wait()


def _gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return all_gather_start(x, axis, dim).wait()


def _scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return reduce_scatter_start(x, axis, dim).wait()


def _slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    # A copy, not a view: the part must not keep the whole of x alive.
    return local_slice(x, axis, dim).clone(memory_format=torch.contiguous_format)


def _apply(forward: Callable[..., Tensor], backward: Callable[..., Tensor], x: Tensor, *where: Any) -> Tensor:
    """forward(x, *where), whose derivative is `backward` of the same place; where: axis, and dim if they have one."""
    return x if where[0].size == 1 else _over_ranks(x, forward, backward, where)


class _Collective(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[..., Tensor], backward: Callable[..., Tensor], where: tuple
    ) -> Tensor:
        ctx.other_way = backward, forward, where
        return forward(x, *where)

    @staticmethod
    @uncompiled("it is communication between ranks")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _Collective.apply(dout, *ctx.other_way), None, None, None


_over_ranks = between_ranks("a collective of pypar.comm")(_Collective.apply)
