"""Which heads a rank takes where ranks share the heads."""

from __future__ import annotations

from typing import NamedTuple


class HeadShare(NamedTuple):
    """queries: these query heads; groups: the key/value heads that they use.

    expanded: for each query head its key/value head, counted from the first of `groups`, where these do not serve
    equally many of the query heads; None where they do.
    """

    queries: slice
    groups: slice
    expanded: tuple[int, ...] | None


def head_share(N: int, G: int, index: int, size: int) -> HeadShare:
    """The share of rank `index` of `size`: N query heads in order, as evenly as they go.

    A key/value head that serves query heads of several ranks is there on each of them.
    """
    begin, end = N * index // size, N * (index + 1) // size
    each = N // G
    used = [head // each for head in range(begin, end)]
    groups = slice(used[0], used[-1] + 1) if used else slice(0, 0)
    counts = {used.count(group) for group in used}
    expanded = tuple(group - groups.start for group in used) if len(counts) > 1 else None
    return HeadShare(slice(begin, end), groups, expanded)
