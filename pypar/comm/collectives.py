"""Started collectives on one mesh axis, without autograd.

Every `..._start` returns at once with a `Handle`; `Handle.wait()` gives the tensor. A buffer that was passed
in must not be written until the handle was waited for. An axis of size 1 returns the tensor that it was
given: no copy, no count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm.cpu_group import CpuProcessGroup
from pypar.comm.traffic import Traffic, wire_bytes
from pypar.ops.uncompiled import between_ranks, uncompiled

if TYPE_CHECKING:
    from pypar.mesh import Axis

# torch 2.13 renamed both and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Handle:
    """A communication in flight. It keeps the buffers alive until it was waited for.

    `wait()` blocks the host on CPU; on CUDA it makes the current stream wait, as torch.distributed does.
    """

    __slots__ = ("_finish", "_keep", "_tensor", "_traffic", "_works")

    def __init__(
        self,
        tensor: Tensor,
        works: tuple[dist.Work, ...] = (),
        *,
        traffic: Traffic | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
        keep: tuple[Tensor, ...] = (),
    ) -> None:
        self._tensor = tensor
        self._works = works
        self._traffic = traffic
        self._finish = finish
        self._keep = keep

    @uncompiled("it asks a communication in flight")
    def is_done(self) -> bool:
        """Whether `wait()` would return at once. gloo says so of messages only after a `wait()`."""
        return all(work.is_completed() for work in self._works)

    @uncompiled("it waits for a communication in flight")
    def wait(self) -> Tensor:
        """Wait until the communication is complete and return its tensor; later calls return it at once."""
        if self._works:
            started = time.perf_counter()
            for work in self._works:
                work.wait()
            if self._traffic is not None:
                self._traffic.record_wait(time.perf_counter() - started)
            self._works = ()
            self._keep = ()
        if self._finish is not None:
            self._tensor, self._finish = self._finish(self._tensor), None
        return self._tensor


@between_ranks("all_reduce_start")
def all_reduce_start(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Handle:
    """Reduce x [any shape] over the axis, in place: after `wait()` x holds the result, and x is returned.

    A non-contiguous x is reduced in a contiguous copy that `wait()` writes back.
    """
    if axis.size == 1:
        return Handle(x)
    buffer = x.detach().contiguous()
    axis.traffic.record("all_reduce", wire_bytes("all_reduce", buffer.nbytes, axis.size))
    work = dist.all_reduce(buffer, op=op, group=axis.group, async_op=True)
    if x.is_contiguous():
        return Handle(x, (work,), traffic=axis.traffic)

    def write_back(reduced: Tensor) -> Tensor:
        x.detach().copy_(reduced)
        return x

    return Handle(buffer, (work,), traffic=axis.traffic, finish=write_back)


@between_ranks("all_gather_start")
def all_gather_start(x: Tensor, axis: Axis, dim: int = 0) -> Handle:
    """Concatenate every rank's x [.., n, ..] along dim, in rank order: `wait()` gives a new [.., R*n, ..].

    x must have the same shape and dtype on every rank. Where a dimension before dim is larger than 1,
    `wait()` makes one copy, from rank-major to dim-major order.
    """
    dim = _checked_dim(x, dim, "all_gather")
    if axis.size == 1:
        return Handle(x)
    source = x.detach().contiguous()
    gathered = source.new_empty((axis.size, *source.shape))
    axis.traffic.record("all_gather", wire_bytes("all_gather", gathered.nbytes, axis.size))
    work = _all_gather(gathered.view(-1), source.view(-1), group=axis.group, async_op=True)
    return Handle(
        gathered,
        (work,),
        traffic=axis.traffic,
        finish=lambda stacked: _joined(stacked, dim),
        keep=(source,),
    )


def _joined(stacked: Tensor, dim: int) -> Tensor:
    """[R, .., n, ..] as [.., R*n, ..]; to autograd a tensor of its own, not a view, so that it may be written to."""
    whole = stacked.movedim(0, dim).contiguous()
    shape = whole.shape
    return torch.ops.aten._unsafe_view(whole, (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]))


@between_ranks("reduce_scatter_start")
def reduce_scatter_start(
    x: Tensor,
    axis: Axis,
    dim: int = 0,
    *,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    out: Tensor | None = None,
) -> Handle:
    """Sum x [.., R*n, ..] over the axis, keep this rank's n rows of dim: `wait()` gives a new [.., n, ..], or out.

    op is SUM or AVG. x is not written, but for out, which is contiguous and may be this rank's part of x. Where a
    dimension before dim is larger than 1, one copy is made, from dim-major to rank-major order. On the CPU the
    parts are added neighbours first, then neighbours of their sums (host by host), in fp32 where x has 16 bits.
    """
    dim = _checked_dim(x, dim, "reduce_scatter")
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x.detach()))
    source = _split_by_rank(x.detach(), axis, dim).contiguous()
    axis.traffic.record("reduce_scatter", wire_bytes("reduce_scatter", source.nbytes, axis.size))
    if x.is_cpu and not isinstance(axis.group, CpuProcessGroup):
        # gloo's reduce_scatter takes 1.5 to 2 times as long (2 and 4 ranks on one host, 1 to 8 MiB), and adds
        # in the tensor's 16 bits.
        parts = torch.empty_like(source)
        divisor = axis.size if op == dist.ReduceOp.AVG else 1

        def finish(received: Tensor) -> Tensor:
            total = _sum_in_order(received, divisor)
            return total if out is None else out.copy_(total)

        work = dist.all_to_all_single(parts.view(-1), source.view(-1), group=axis.group, async_op=True)
        return Handle(parts, (work,), traffic=axis.traffic, finish=finish, keep=(source,))
    part = source.new_empty(source.shape[1:]) if out is None else out
    work = _reduce_scatter(part.view(-1), source.view(-1), op=op, group=axis.group, async_op=True)
    return Handle(part, (work,), traffic=axis.traffic, keep=(source,))


def _sum_in_order(parts: Tensor, divisor: int) -> Tensor:
    """The sum of parts [R, ...] over R > 1 ranks / divisor, neighbours first, in fp32 where they have 16 bits."""
    sums = list(parts.float() if parts.dtype in (torch.bfloat16, torch.float16) else parts)
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] if i + 1 < len(sums) else sums[i] for i in range(0, len(sums), 2)]
    total = sums[0]
    return (total if divisor == 1 else total / divisor).to(parts.dtype)


def local_slice(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's n rows of dim of x [.., R*n, ..], as a view [.., n, ..]."""
    return _split_by_rank(x, axis, _checked_dim(x, dim, "split"))[axis.rank]


def _split_by_rank(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """View x [.., R*n, ..] as [R, .., n, ..]."""
    length = x.shape[dim]
    if length % axis.size:
        fewer, more = length - length % axis.size, length + -length % axis.size
        raise ValueError(
            f"dim {dim} ({length}) of a tensor of shape {tuple(x.shape)} must divide by the size of axis "
            f"{axis.name!r} ({axis.size}); use {f'{fewer} or {more}' if fewer else more}, or pad it"
        )
    return x.unflatten(dim, (axis.size, length // axis.size)).movedim(dim, 0)


def _checked_dim(x: Tensor, dim: int, what: str) -> int:
    """dim as a non-negative index."""
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"{what} along dim {dim} needs a tensor that has it, but its shape is {tuple(x.shape)}; "
            + (
                f"use a dim from {-x.ndim} to {x.ndim - 1}"
                if x.ndim
                else "give it a dimension with x.view(1)"
            )
        )
    return dim % x.ndim
