"""The itinerary of a ring: which block of keys and values is where at which hop.

At hop h a rank computes with the block of rank - h, of those that its queries see. Every rank works the whole
table out from what each rank holds and the mask, so nothing is negotiated and nothing is sent that nobody needs.

Forward: hops ascend from 0, the rank's own block. Block s visits the ranks s + h for its visible hops h in
ascending order, straight from one to the next.
Backward: hops descend to 0. A block visits its hops in descending order, and the fp32 sums of its dk and dv follow
it; the last of them travel home while every rank computes its own block. The block of a rank's highest hop is
still there from the forward, so most blocks need not travel to where they begin.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from pypar.context_parallel.layouts import Segments
from pypar.context_parallel.masks import Mask, visible

KEYS, SUMS = "keys and values", "their gradients"


class Transfer(NamedTuple):
    """The block of rank `source`, its KEYS or the SUMS of its gradients, moves from one rank to another."""

    kind: str
    source: int
    sender: int
    receiver: int


class Route(NamedTuple):
    """forward[h], backward[h]: what is in flight while hop h computes, in the order in which all ranks start it.

    forward[h] brings keys for hop h + 1. backward[h] brings keys for hop h - 1 and sums for hop h, to which the
    rank then adds what it computed in that hop.
    hops[r]: the hops at which rank r sees something, ascending; 0 is always among them.
    """

    forward: tuple[tuple[Transfer, ...], ...]
    backward: tuple[tuple[Transfer, ...], ...]
    hops: tuple[tuple[int, ...], ...]

    def of(self, rank: int) -> RankRoute:
        """What concerns one rank."""
        forward, backward = (
            tuple(tuple(t for t in transfers if rank in (t.sender, t.receiver)) for transfers in direction)
            for direction in (self.forward, self.backward)
        )
        return RankRoute(forward, backward, self.hops[rank])


class RankRoute(NamedTuple):
    """A route as one rank sees it: the transfers of each hop that it sends or receives, the hops that it computes.

    It keeps the block of its highest hop from forward to backward.
    """

    forward: tuple[tuple[Transfer, ...], ...]
    backward: tuple[tuple[Transfer, ...], ...]
    hops: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def rank_route(queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask, rank: int) -> RankRoute:
    return route(queries, keys, mask).of(rank)


@functools.lru_cache(maxsize=8)
def route(queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask) -> Route:
    """queries, keys: what each rank holds, by rank."""
    size = len(keys)
    visits = [
        [h for h in range(size) if h == 0 or visible(queries[(s + h) % size], keys[s], mask)]
        for s in range(size)
    ]
    hops = tuple(tuple(h for h in range(size) if h in visits[(r - h) % size]) for r in range(size))
    forward: list[list[Transfer]] = [[] for _ in range(size)]
    backward: list[list[Transfer]] = [[] for _ in range(size)]
    for source, stops in enumerate(visits):
        for hop, following in zip(stops, stops[1:], strict=False):
            here, there = (source + hop) % size, (source + following) % size
            forward[following - 1].append(Transfer(KEYS, source, here, there))
            backward[hop].append(Transfer(SUMS, source, there, here))
            if hop > 0 and hop != hops[here][-1]:
                backward[hop + 1].append(Transfer(KEYS, source, there, here))
        first = stops[-1]
        if first > 0 and first != hops[(source + first) % size][-1]:
            backward[first + 1].append(Transfer(KEYS, source, source, (source + first) % size))
    return Route(_ordered(forward), _ordered(backward), hops)


def _ordered(of_hops: list[list[Transfer]]) -> tuple[tuple[Transfer, ...], ...]:
    return tuple(tuple(sorted(transfers)) for transfers in of_hops)
