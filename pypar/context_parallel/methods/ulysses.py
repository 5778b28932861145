"""Ulysses: all-to-all between shards of the sequence and shards of the heads, and attention over whole sequences.

Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509. With a ring outside (Fang and Zhao, USP, arXiv 2405.07719) the
all-to-all is among some neighbours, and what they hold together goes round the ring of the others: plain Ulysses is
the case with a ring of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pypar.comm import exchange_start
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.layouts import Segments, num_positions, positions_in, unions
from pypar.context_parallel.methods.heads import HeadShare, head_share
from pypar.context_parallel.methods.ring.method import ring
from pypar.mesh import Axis
from pypar.ops.uncompiled import uncompiled

_TAG = 1 << 27  # apart from the tags of a ring on the same group


def ulysses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`. As many heads a rank as there are, give or take one; key/value heads where they are used."""
    refuse_options("ulysses", call.method_options)
    return attend(q, k, v, call, call.axis, Axis.single(call.axis.name))


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, inner: Axis, outer: Axis) -> tuple[Tensor, Tensor]:
    """inner: the ranks that share heads, neighbours on call.axis; outer: those that pass what they hold round a ring.

    Rank r of call.axis is rank r % inner.size of inner and rank r // inner.size of outer.
    """
    N, G = q.shape[-2], k.shape[-2]
    if inner.size > N:
        raise ValueError(
            f"ulysses over {inner.size} ranks needs at least as many query heads, but q has {N}; use method='ring', "
            f"or method='hybrid' with method_options={{'ulysses_size': {N}}} or less"
        )
    shares = [head_share(N, G, index, inner.size) for index in range(inner.size)]
    mine = shares[inner.rank]
    first = outer.rank * inner.size
    rows = _Rows.of([call.queries[first + i] for i in range(inner.size)], q.device)
    keys = _Rows.of([call.keys[first + i] for i in range(inner.size)], q.device)
    bias_has_rows = call.bias is not None and _has_rows(call.bias, call.queries, q.shape[-3])

    tensors = [
        (q, [s.queries for s in shares], rows),
        *((x, [s.groups for s in shares], keys) for x in (k, v)),
    ]
    if call.bias is not None and bias_has_rows:
        bias = call.bias.expand(-1, -1, q.shape[-3], -1).transpose(1, 2)
        every = [s.queries if bias.shape[2] > 1 else slice(0, 1) for s in shares]
        tensors.append((bias, every, rows))
    parts = [[x[..., heads, :] for heads in each] for x, each, _ in tensors]
    shapes = [
        [
            (*x.shape[:-3], count, each[inner.rank].stop - each[inner.rank].start, x.shape[-1])
            for count in held.counts
        ]
        for x, each, held in tensors
    ]
    received = _exchange(inner, parts, shapes)
    whole = [held.in_order(x) for x, (_, _, held) in zip(received, tensors, strict=True)]
    if mine.expanded is not None:
        index = torch.tensor(mine.expanded, device=q.device)
        whole[1:3] = [x.index_select(-2, index) for x in whole[1:3]]
    there = _call_of(call, mine, outer, inner.size, whole[3].transpose(1, 2) if bias_has_rows else None)
    out, lse = ring(whole[0], whole[1], whole[2], there)

    heads = [s.queries.stop - s.queries.start for s in shares]
    back = [out, lse.mT.unsqueeze(-1)]
    parts = [rows.parts(x) for x in back]
    shapes = [[(*x.shape[:-3], q.shape[-3], n, x.shape[-1]) for n in heads] for x in back]
    out, lse = (torch.cat(x, -2) for x in _exchange(inner, parts, shapes))
    return out, lse.squeeze(-1).mT.contiguous()


def _call_of(call: Call, mine: HeadShare, outer: Axis, inner_size: int, bias: Tensor | None) -> Call:
    """The call for some heads, over ranks that each hold what inner_size ranks held."""
    heads = mine.queries
    if bias is None and call.bias is not None:  # one row for all queries
        bias = call.bias[:, heads] if call.bias.shape[1] > 1 else call.bias
    return replace(
        call,
        axis=outer,
        queries=unions(call.queries, inner_size, call.layout),
        keys=unions(call.keys, inner_size, call.layout),
        sinks=None if call.sinks is None else call.sinks[heads],
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[..., heads],
        bias=bias,
        head_start=call.head_start + heads.start,
        method_options={},
    )


def _has_rows(bias: Tensor, queries: tuple[Segments, ...], held: int) -> bool:
    """Whether the bias has a row for each query; where a rank holds one query its bias does not tell, so: yes."""
    return bias.shape[2] > 1 or held <= 1 or any(num_positions(segments) <= 1 for segments in queries)


@dataclass(frozen=True)
class _Rows:
    """The rows that some ranks hold, one rank's after the other's, and their order in the sequence."""

    counts: list[int]
    place: Tensor  # place[i]: of the rows one after the other, the one that is ith in the sequence
    back: Tensor

    @classmethod
    def of(cls, held: Sequence[Segments], device: torch.device) -> _Rows:
        place = torch.cat([positions_in(segments) for segments in held]).argsort()
        return cls([num_positions(s) for s in held], place.to(device), place.argsort().to(device))

    def in_order(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, -3).index_select(-3, self.place)

    def parts(self, x: Tensor) -> list[Tensor]:
        return [x.index_select(-3, rows) for rows in self.back.split(self.counts)]


# ---- all-to-all


def _exchange(
    axis: Axis, parts: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]
) -> list[list[Tensor]]:
    """parts[i][r] goes to rank r; returns by tensor and rank what came, of shapes[i][r]; differentiable."""
    if axis.size == 1:
        return parts
    flat = _Exchange.apply(axis, shapes, *(part for each in parts for part in each))  # type: ignore[no-untyped-call]
    return [list(flat[i : i + axis.size]) for i in range(0, len(flat), axis.size)]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, axis: Axis, shapes: list[list[tuple[int, ...]]], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.shapes = axis, [part.shape for part in parts]
        with _named("forward", axis):
            return _swap(axis, parts, [shape for each in shapes for shape in each])

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with _named("backward", ctx.axis):
            return None, None, *_swap(ctx.axis, gradients, ctx.shapes)


def _swap(axis: Axis, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """parts and shapes: tensor by tensor, for each one by rank. One message a rank and dtype."""
    size, me = axis.size, axis.rank
    found: list[Tensor | None] = [None] * len(parts)
    tensors = range(len(parts) // size)
    for tag, dtype in enumerate(dict.fromkeys(parts[i * size].dtype for i in tensors)):
        members = [i for i in tensors if parts[i * size].dtype == dtype]
        sends, receives, arriving = [], [], []
        for rank in range(size):
            here = [i * size + rank for i in members]
            if rank == me:
                for i in here:
                    found[i] = parts[i]
                continue
            packed = torch.cat([parts[i].detach().reshape(-1) for i in here])
            lengths = [torch.Size(shapes[i]).numel() for i in here]
            if packed.numel():
                sends.append((packed, rank))
            buffer = packed.new_empty(sum(lengths))
            if buffer.numel():
                receives.append((buffer, rank))
            for i, part in zip(here, buffer.split(lengths), strict=True):
                arriving.append((i, part.view(shapes[i])))
        sent, received = exchange_start(sends, receives, axis, _TAG + tag)
        for handle in (*received, *sent):
            handle.wait()
        for i, part in arriving:
            found[i] = part
    return tuple(x for x in found if x is not None)


@contextlib.contextmanager
def _named(direction: str, axis: Axis) -> Iterator[None]:
    """An error of the communication tells where it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"ulysses, {direction}, all-to-all on rank {axis.rank} of axis {axis.name!r}: {error}"
        ) from error
