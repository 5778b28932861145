"""Which positions of a sequence each rank of a context-parallel axis holds.

    contiguous   rank r holds the r-th of R chunks
    zigzag       rank r holds chunks r and 2R-1-r of 2R chunks, so that under a causal mask every rank has the
                 same work (Llama 3, arXiv 2407.21783, section 3.3.2)
    striped      rank r holds positions r, r+R, r+2R, ...: the same work too, and every hop of a ring is half
                 masked (Brandon et al., Striped Attention, arXiv 2311.09431)

A layout is a function (length, rank, size) -> segments in `LAYOUTS`; everything else follows from the segments.
Any length goes: chunks are those of `torch.tensor_split` (the first ones have one position more), and a rank may
hold nothing. Positions ascend on every rank.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import gather_replicated
from pypar.mesh import Axis, as_axis
from pypar.ops.uncompiled import between_ranks, uncompiled


@dataclass(frozen=True)
class Segment:
    """The positions start, start + step, ...: `count` of them, at least one."""

    start: int
    count: int
    step: int = 1

    @property
    def last(self) -> int:
        """The last position."""
        return self.start + self.step * (self.count - 1)


Segments = tuple[Segment, ...]


@uncompiled("positions are worked out on the host, for each length anew")
def shard(x: Tensor, dim: int, group: Axis | dist.ProcessGroup, layout: str) -> Tensor:
    """This rank's part [.., T, ..] of x [.., length, ..], which is the same on every rank; contiguous.

    Differentiable: the gradient of x has this rank's rows and is zero elsewhere (sum it over the axis for
        the whole).
    ValueError: an unknown layout.
    """
    axis = as_axis(group)
    if axis.size == 1:
        segments_of(x.shape[dim], 0, 1, layout)
        return x
    return x.index_select(dim, positions_of(x.shape[dim], axis.rank, axis.size, layout).to(x.device))


@between_ranks("unshard")
def unshard(
    x: Tensor, dim: int, group: Axis | dist.ProcessGroup, layout: str, length: int | None = None
) -> Tensor:
    """The whole [.., length, ..] from every rank's part x [.., T, ..], on every rank: undoes `shard`.

    length: of the whole; None where every rank holds equally many, then it is R * T.
    Differentiable for a use that is the same on every rank: each rank gets its own rows of the gradient.
    ValueError: an unknown layout, a part that is not this rank's share of `length`.
    """
    axis = as_axis(group)
    dim = dim % x.dim()
    length = x.shape[dim] * axis.size if length is None else length
    check_part("x", x.shape[dim], length, axis, layout, "length")
    if axis.size == 1:
        return x
    held = [positions_of(length, rank, axis.size, layout) for rank in range(axis.size)]
    most = max(len(part) for part in held)
    if len(held[axis.rank]) < most:  # all parts of one gather have one size
        filling = x.new_zeros((*x.shape[:dim], most - x.shape[dim], *x.shape[dim + 1 :]))
        x = torch.cat([x, filling], dim)
    # Position p is row place[p] of the gathered parts.
    rows = torch.cat([torch.arange(len(part)) + rank * most for rank, part in enumerate(held)])
    place = torch.empty_like(rows)
    place[torch.cat(held)] = rows
    return gather_replicated(x, axis, dim).index_select(dim, place.to(x.device))


@uncompiled("positions are worked out on the host, for each length anew")
def positions(length: int, group: Axis | dist.ProcessGroup, layout: str) -> Tensor:
    """Which positions of a sequence of `length` this rank holds: int64 [T], ascending, on CPU."""
    axis = as_axis(group)
    return positions_of(length, axis.rank, axis.size, layout)


def positions_of(length: int, rank: int, size: int, layout: str) -> Tensor:
    """`positions` of any rank of an axis of `size` ranks."""
    return positions_in(segments_of(length, rank, size, layout))


def segments_of(length: int, rank: int, size: int, layout: str) -> Segments:
    """What rank `rank` of `size` holds of a sequence of `length`; () where that is nothing."""
    if layout not in LAYOUTS:
        close = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "use one of them"
        raise ValueError(f"sequence layout {layout!r} is not one of {', '.join(LAYOUTS)}; {hint}")
    return _joined(LAYOUTS[layout](length, rank, size))


def unions(held: tuple[Segments, ...], size: int, layout: str) -> tuple[Segments, ...]:
    """What every `size` neighbours hold together. ValueError where these are not chunks of the sequence."""
    if size == len(held):
        total = sum(num_positions(segments) for segments in held)
        return ((Segment(0, total),) if total else (),)
    if any(segment.step > 1 for segments in held for segment in segments):
        raise ValueError(
            f"a ring of neighbours' parts needs a layout of chunks, and {layout!r} has none; use zigzag or contiguous"
        )
    groups = (held[first : first + size] for first in range(0, len(held), size))
    return tuple(
        _joined(sorted((s for segments in group for s in segments), key=lambda s: s.start))
        for group in groups
    )


def positions_in(segments: Segments) -> Tensor:
    """int64 [T], on CPU."""
    parts = [torch.arange(s.start, s.last + 1, s.step) for s in segments]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def num_positions(segments: Segments) -> int:
    return sum(segment.count for segment in segments)


@functools.lru_cache(maxsize=1024)
def cut(segments: Segments, begin: int, end: int) -> Segments:
    """The positions from index `begin` to before `end` of those that a rank holds."""
    found, first = [], 0
    for segment in segments:
        skipped = max(begin - first, 0)
        count = min(end - first, segment.count) - skipped
        if count > 0:
            found.append(Segment(segment.start + segment.step * skipped, count, segment.step))
        first += segment.count
    return tuple(found)


def check_part(name: str, held: int, length: int, axis: Axis, layout: str, argument: str) -> None:
    """ValueError unless `held` positions are this rank's share of `length`, which `argument` gave."""
    share = num_positions(segments_of(length, axis.rank, axis.size, layout))
    if held != share:
        raise ValueError(
            f"{name} has {held} positions on rank {axis.rank} of axis {axis.name!r}, whose share of a sequence of "
            f"{length} in the {layout} layout is {share}; shard it with this layout, or pass the sequence's length "
            f"as {argument}"
        )


def _contiguous(length: int, rank: int, size: int) -> list[Segment]:
    return [_chunk(length, rank, size)]


def _zigzag(length: int, rank: int, size: int) -> list[Segment]:
    return [_chunk(length, rank, 2 * size), _chunk(length, 2 * size - 1 - rank, 2 * size)]


def _striped(length: int, rank: int, size: int) -> list[Segment]:
    return [Segment(rank, len(range(rank, length, size)), size)]


def _chunk(length: int, index: int, num_chunks: int) -> Segment:
    each, more = divmod(length, num_chunks)
    return Segment(index * each + min(index, more), each + (index < more))


def _joined(segments: list[Segment]) -> Segments:
    """Without the empty ones, and those that continue each other made one."""
    joined: list[Segment] = []
    for segment in segments:
        before = joined[-1] if joined else None
        if before and before.step == segment.step == 1 and before.last + 1 == segment.start and segment.count:
            joined[-1] = Segment(before.start, before.count + segment.count)
        elif segment.count:
            joined.append(segment)
    return tuple(joined)


LAYOUTS: dict[str, Callable[[int, int, int], list[Segment]]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "striped": _striped,
}
