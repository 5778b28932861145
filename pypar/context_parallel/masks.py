"""What of a mask concerns some queries and some keys: rectangles of attention, each one call of the op.

Queries and keys are segments of the sequence (`layouts`). Query t of a document with Td queries and Sd keys stands
at position t + Sd - Td of it, as in `pypar.attention`: the last query is at the last key.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pypar.context_parallel.layouts import Segment, Segments, num_positions
from pypar.ops.attention.arguments import UNBOUNDED, Positions


@dataclass(frozen=True)
class Mask:
    """Which keys of the whole sequence a query sees.

    left, right: at most so many positions before and after its own; UNBOUNDED: all. Causal is right = 0.
    queries, keys: where the documents begin and end, (0, .., length); a query sees its own document only. Without
    documents they are (0, length).
    """

    left: int
    right: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def length_q(self) -> int:
        return self.queries[-1]

    @property
    def length_k(self) -> int:
        return self.keys[-1]


@dataclass(frozen=True)
class Piece:
    """A rectangle of attention: these rows of a rank's queries against these of a block's keys.

    positions: where both stand in their document; batch_start is the document's index, or the first one's.
    masked: False where every query sees every key; then the mask need not be asked.
    cu_seqlens_q, cu_seqlens_k: boundaries within rows and keys where several documents are one piece.
    pairs: how many (query, key) see each other: the work.
    """

    rows: slice
    keys: slice
    positions: Positions
    masked: bool
    pairs: int
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None

    @property
    def num_documents(self) -> int:
        return 1 if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1


@functools.lru_cache(maxsize=1024)
def pieces(queries: Segments, keys: Segments, mask: Mask, merge: bool = True) -> tuple[Piece, ...]:
    """The rectangles that together hold every visible pair once; none without a visible pair.

    merge: rectangles that nothing but the mask tells apart become one, and positions then count from the
    rectangle. Not where positions have another use: ALiBi, dropout, a bias.
    """
    if merge and queries == keys and len(queries) > 1 and _only_order_matters(queries, mask):
        n = num_positions(queries)
        return (Piece(slice(0, n), slice(0, n), Positions(), True, n * (n + 1) // 2),)
    found: list[Piece] = []
    for first_row, q_segment in _placed(queries):
        for first_key, k_segment in _placed(keys):
            each = (_piece(run) for run in _runs(q_segment, k_segment, mask, first_row, first_key))
            found += _grouped([piece for piece in each if piece is not None])
    return tuple(_merged(found)) if merge else tuple(found)


def visible(queries: Segments, keys: Segments, mask: Mask) -> bool:
    """Whether any of the queries sees any of the keys."""
    return any(
        _piece(run) is not None
        for q_segment in queries
        for k_segment in keys
        for run in _runs(q_segment, k_segment, mask, 0, 0)
    )


def _only_order_matters(segments: Segments, mask: Mask) -> bool:
    """Whether the mask is plainly causal and the positions ascend: then a position may stand for any other."""
    plain = (mask.left, mask.right) == (UNBOUNDED, 0) and mask.queries == mask.keys and len(mask.keys) == 2
    return plain and all(a.last < b.start for a, b in zip(segments, segments[1:], strict=False))


class _Run(NamedTuple):
    """The part of a pair of segments that lies in one document."""

    document: int
    first_row: int
    first_key: int
    num_rows: int
    num_keys: int
    q_start: int
    k_start: int
    step: int
    left: int
    right: int


def _placed(segments: Segments) -> Iterator[tuple[int, Segment]]:
    """Each segment with the index of its first position among all that the rank holds."""
    first = 0
    for segment in segments:
        yield first, segment
        first += segment.count


def _runs(q: Segment, k: Segment, mask: Mask, first_row: int, first_key: int) -> Iterator[_Run]:
    step = max(q.step, k.step)
    assert all(s.step == step or s.count == 1 for s in (q, k)), "queries and keys have one step"
    begin = max(bisect.bisect_right(mask.queries, q.start), bisect.bisect_right(mask.keys, k.start)) - 1
    for document in range(max(begin, 0), len(mask.queries) - 1):
        q_from, q_to = mask.queries[document : document + 2]
        k_from, k_to = mask.keys[document : document + 2]
        if q_from > q.last or k_from > k.last:
            return
        rows, columns = _inside(q, q_from, q_to), _inside(k, k_from, k_to)
        if not rows or not columns:
            continue
        ahead = (k_to - k_from) - (q_to - q_from)
        yield _Run(
            document,
            first_row + rows.start,
            first_key + columns.start,
            len(rows),
            len(columns),
            q.start + step * rows.start - q_from + ahead,
            k.start + step * columns.start - k_from,
            step,
            mask.left,
            mask.right,
        )


def _inside(segment: Segment, begin: int, end: int) -> range:
    """Which of a segment's positions, by index, are in [begin, end)."""
    first = -(-(begin - segment.start) // segment.step)
    stop = -(-(end - segment.start) // segment.step)
    return range(max(first, 0), min(stop, segment.count))


def _piece(run: _Run) -> Piece | None:
    """The run without rows that see nothing and keys that nobody sees; None where nothing is left.

    Row i sees key j when low <= i - j <= high: of the distance q_start - k_start + step * (i - j), at least -right
    and at most left.
    """
    rows, keys, ahead = run.num_rows, run.num_keys, run.q_start - run.k_start
    low = -keys if run.right == UNBOUNDED else max(-((run.right + ahead) // run.step), -keys)
    high = rows if run.left == UNBOUNDED else min((run.left - ahead) // run.step, rows)
    row, key = max(0, low), max(0, -high)
    row_end, key_end = min(rows, keys + high), min(keys, rows - low)
    if low > high or row >= row_end or key >= key_end:
        return None
    low, high = low - row + key, high - row + key
    rows, keys = row_end - row, key_end - key
    pairs = _pairs_up_to(high, rows, keys) - _pairs_up_to(low - 1, rows, keys)
    return Piece(
        slice(run.first_row + row, run.first_row + row_end),
        slice(run.first_key + key, run.first_key + key_end),
        Positions(run.q_start + run.step * row, run.k_start + run.step * key, run.step, run.document),
        pairs < rows * keys,
        pairs,
    )


def _pairs_up_to(difference: int, rows: int, keys: int) -> int:
    """How many (i, j) of a rectangle have i - j <= difference."""
    whole = min(max(difference + 1, 0), rows)  # rows up to here have all keys
    begin, end = max(difference + 1, 0), min(rows, difference + keys)
    partly = (end - begin) * (2 * (keys + difference) - begin - end + 1) // 2 if end > begin else 0
    return whole * keys + partly


def _grouped(found: list[Piece]) -> list[Piece]:
    """Documents that follow each other without a gap, at the same positions in themselves, as one piece."""
    groups: list[list[Piece]] = []
    for piece in found:
        before = groups[-1][-1] if groups else None
        if before and _continues(before, piece):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [_together(group) for group in groups]


def _continues(before: Piece, piece: Piece) -> bool:
    same = replace(before.positions, batch_start=piece.positions.batch_start) == piece.positions
    return same and before.rows.stop == piece.rows.start and before.keys.stop == piece.keys.start


def _together(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    first, last = group[0], group[-1]
    ends_q, ends_k = [0], [0]
    for before, piece in zip([None, *group], group, strict=False):
        # Documents in between have neither rows nor keys here, but count.
        between = 0 if before is None else piece.positions.batch_start - before.positions.batch_start - 1
        ends_q += [ends_q[-1]] * between + [piece.rows.stop - first.rows.start]
        ends_k += [ends_k[-1]] * between + [piece.keys.stop - first.keys.start]
    return Piece(
        slice(first.rows.start, last.rows.stop),
        slice(first.keys.start, last.keys.stop),
        first.positions,
        any(piece.masked for piece in group),
        sum(piece.pairs for piece in group),
        tuple(ends_q),
        tuple(ends_k),
    )


def _merged(found: list[Piece]) -> list[Piece]:
    """Unmasked rectangles that share a side as one."""
    merged: list[Piece] = []
    for piece in found:
        for index, other in enumerate(merged):
            if joined := _union(other, piece):
                merged[index] = joined
                break
        else:
            merged.append(piece)
    return merged if len(merged) == len(found) else _merged(merged)


def _union(a: Piece, b: Piece) -> Piece | None:
    if a.masked or b.masked or a.cu_seqlens_q is not None or b.cu_seqlens_q is not None:
        return None
    if a.keys == b.keys and a.rows.stop == b.rows.start:
        return replace(a, rows=slice(a.rows.start, b.rows.stop), pairs=a.pairs + b.pairs)
    if a.rows == b.rows and a.keys.stop == b.keys.start:
        return replace(a, keys=slice(a.keys.start, b.keys.stop), pairs=a.pairs + b.pairs)
    return None


def work(found: tuple[Piece, ...]) -> int:
    """Visible pairs of all pieces."""
    return sum(piece.pairs for piece in found)
