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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from pypar.comm.collectives import all_gather_start, all_reduce_start, local_slice, reduce_scatter_start

if TYPE_CHECKING:
    from pypar.mesh import Axis


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """x [any shape], the same on every rank, used in a different way on each: gradients are summed."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis of x [any shape], whose use is the same on every rank."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' x [.., n, ..] along dim as [.., R*n, ..], used in a different way on each rank."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis, dim)


def reduce_scatter_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part [.., n, ..] along dim of the sum over the axis of x [.., R*n, ..]."""
    return x if axis.size == 1 else _ReduceScatterTo.apply(x, axis, dim)


def split_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part [.., n, ..] along dim of x [.., R*n, ..], which is the same on every rank."""
    return x if axis.size == 1 else _SplitTo.apply(x, axis, dim)


def gather_replicated(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' x [.., n, ..] along dim as [.., R*n, ..], used in the same way on each rank."""
    return x if axis.size == 1 else _GatherReplicated.apply(x, axis, dim)


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _ReduceFrom.apply(dout, ctx.axis), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce_start(x.clone(memory_format=torch.contiguous_format), axis).wait()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _CopyTo.apply(dout, ctx.axis), None


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather_start(x, axis, dim).wait()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _ReduceScatterTo.apply(dout, ctx.axis, ctx.dim), None, None


class _ReduceScatterTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter_start(x, axis, dim).wait()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherFrom.apply(dout, ctx.axis, ctx.dim), None, None


class _SplitTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        # A copy, not a view: the part must not keep the whole of x alive.
        return local_slice(x, axis, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherReplicated.apply(dout, ctx.axis, ctx.dim), None, None


class _GatherReplicated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather_start(x, axis, dim).wait()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _SplitTo.apply(dout, ctx.axis, ctx.dim), None, None
