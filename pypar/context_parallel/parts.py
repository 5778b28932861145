"""The parts in which a ring sends and computes blocks: some heads, and some of their keys.

With few hops a block goes in several parts: the first one is used while the others arrive, and goes on while the
others compute. Otherwise the only hop of two ranks would have to wait for the whole block. Parts by key/value heads
cost nothing: each has its own queries. Parts by keys go over the same queries again, so they are made where heads
do not suffice and messages leave the host, and where blocks are so long that the memory of what travels counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypar.context_parallel.heads import HeadGroup

_MOST_STEPS = 4  # that a walk is split into, where hops are fewer
_LEAST_POSITIONS = 1024  # of a block that is split
# Of a part by keys: over fewer keys attention is slower. Two ranks with 8,192 tokens in bf16 and whole heads reached
# 80, 88 and 91 % of the ideal with parts of 1,024, 2,048 and 4,096.
_LEAST_KEYS, _LEAST_KEYS_FAR = 4096, 2048
_MOST_KEYS = 8192


@dataclass(frozen=True, eq=False)  # known by identity
class Part:
    """Some heads, and of their keys the `index`th of `count` shares."""

    heads: HeadGroup
    index: int
    count: int

    def span(self, positions: int) -> tuple[int, int]:
        """Where it begins and ends among so many."""
        return positions * self.index // self.count, positions * (self.index + 1) // self.count


def parts_of(N: int, G: int, size: int, positions: int, in_one_host: bool) -> tuple[Part, ...]:
    """Of blocks of at most so many positions with G heads, for N query heads, on an axis of `size` ranks."""
    if size == 1:
        return (Part(HeadGroup.of(N, G, slice(0, G)), 0, 1),)
    wanted = -(-_MOST_STEPS // (size - 1)) if positions >= _LEAST_POSITIONS else 1
    num_groups = max(1, min(wanted, G))
    least = _LEAST_KEYS if in_one_host else _LEAST_KEYS_FAR
    by_keys = min(-(-wanted // num_groups), positions // least)
    count = max(1, by_keys, -(-positions // _MOST_KEYS))
    bounds = [G * i // num_groups for i in range(num_groups + 1)]
    groups = [HeadGroup.of(N, G, slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    return tuple(Part(heads, i, count) for i in range(count) for heads in groups)
