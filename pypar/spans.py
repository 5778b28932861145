"""Ranges of indices: how a length is cut into parts, and what of several ranges a part of them holds."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]  # start and end


def part(length: int, index: int, count: int) -> Span:
    """Part ``index`` of a range cut as torch.tensor_split does."""
    base, extra = divmod(length, count)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def within(spans: Iterable[Span], start: int, end: int) -> list[Span]:
    """What of ranges that lie behind each other is at [start, end) of them."""
    pieces, at = [], 0
    for first, last in spans:
        low, high = max(start, at), min(end, at + last - first)
        if low < high:
            pieces.append((first + low - at, first + high - at))
        at += last - first
    return pieces


def joined(spans: Iterable[Span]) -> list[Span]:
    """Ranges that follow each other as one; at least one, perhaps empty."""
    result: list[Span] = []
    for start, end in spans:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result or [(0, 0)]
