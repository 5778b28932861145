"""The rounds in which a ring goes over long blocks, and the sub-blocks in which it sends and computes them.

With few hops a block goes in several sub-blocks: the first one is used while the others arrive, and goes on while the
others compute. Otherwise the only hop of two ranks would have to wait for the whole block. Sub-blocks by key/value
heads cost nothing: each has its own queries. Sub-blocks by keys go over the same queries again, so they are made where
heads do not suffice, and smaller ones where messages leave the host.
Of long blocks each round takes some of the keys all the way round, so that what travels takes little memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypar.context_parallel.methods.heads import HeadGroup

_MOST_STEPS = 4  # that a block's way round the ring is split into, where hops are fewer
_LEAST_POSITIONS = 1024  # in a block that is split
# In a sub-block by keys: over fewer keys attention is slower. Two ranks with 8,192 tokens in bf16 and whole heads
# reached 80, 88 and 91 % of the ideal with sub-blocks of 1,024, 2,048 and 4,096 keys.
_LEAST_KEYS, _LEAST_KEYS_FAR = 4096, 2048
_MOST_KEYS = 8192  # in a round


@dataclass(frozen=True, eq=False)  # known by identity
class SubBlock:
    """Some heads of a block, and of their keys those between the shares begin / of and end / of of all."""

    heads: HeadGroup
    begin: int
    end: int
    of: int

    def span(self, positions: int) -> tuple[int, int]:
        """Where the sub-block begins and ends among so many positions."""
        return positions * self.begin // self.of, positions * self.end // self.of

    @property
    def has_all_keys(self) -> bool:
        return self.end - self.begin == self.of


@dataclass(frozen=True)
class Round:
    """One way of some of the keys round the ring: all of them as one sub-block, and the sub-blocks that make it up."""

    whole: SubBlock
    sub_blocks: tuple[SubBlock, ...]


def rounds_of(N: int, G: int, size: int, positions: int, in_one_host: bool) -> tuple[Round, ...]:
    """The rounds for blocks of at most so many positions of G heads, and N query heads, on an axis of `size` ranks."""
    everything = HeadGroup.of(N, G, slice(0, G))
    if size == 1 or positions < _LEAST_POSITIONS:
        whole = SubBlock(everything, 0, 1, 1)
        return (Round(whole, (whole,)),)
    num_rounds = -(-positions // _MOST_KEYS)
    wanted = -(-_MOST_STEPS // (size - 1))
    num_groups = min(wanted, G)
    least = _LEAST_KEYS if in_one_host else _LEAST_KEYS_FAR
    each = max(1, min(-(-wanted // num_groups), positions // num_rounds // least))
    bounds = [G * i // num_groups for i in range(num_groups + 1)]
    groups = [HeadGroup.of(N, G, slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    of = num_rounds * each
    return tuple(
        Round(
            SubBlock(everything, first, first + each, of),
            tuple(SubBlock(heads, i, i + 1, of) for i in range(first, first + each) for heads in groups),
        )
        for first in range(0, of, each)
    )
