"""Which heads a rank takes where ranks share the heads, and some heads of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from pypar.context_parallel.call import Call


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


class HeadGroup(NamedTuple):
    """queries: these query heads; groups: the key/value heads that they use."""

    queries: slice
    groups: slice

    @classmethod
    def of(cls, N: int, G: int, groups: slice) -> HeadGroup:
        """These of G key/value heads, for N query heads."""
        return cls(slice(groups.start * (N // G), groups.stop * (N // G)), groups)

    @property
    def rows(self) -> tuple[Any, ...]:
        """The index of the query heads' part of [.., T, N, H] and of [.., N, T] alike."""
        return (..., self.queries, slice(None))

    def call(self, call: Call) -> Call:
        """The call for these query heads alone."""
        slopes = call.alibi_slopes
        return replace(
            call,
            alibi_slopes=None if slopes is None else slopes[..., self.queries],
            bias=self.bias(call.bias),
            sinks=None if call.sinks is None else call.sinks[self.queries],
            head_start=call.head_start + self.queries.start,
        )

    def bias(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, self.queries]
