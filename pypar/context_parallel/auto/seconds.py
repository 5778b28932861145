"""Seconds that each method takes, by formulas of shapes, layout, mask and what a machine costs.

    attention    2 products of visible pairs forward, 5 backward; something for each query of a call, for each call
    transfer     bytes / speed + latency; while it is in flight the ranks at its ends compute, but for its `own_share`
    ring         every step of every rank in order: what it sends, what it waits for, its attention
    all_gather   the first gather and, backward, the last scatter have nothing to hide behind; the others do
    ulysses      nothing hides: two all-to-alls and the attention of some heads over all positions
    hybrid       the all-to-alls among neighbours show, the ring is a ring

What a method packs and puts in order is counted too: the bytes that it writes in its own memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pypar.context_parallel.auto import volume
from pypar.context_parallel.auto.volume import Sizes
from pypar.context_parallel.layouts import Segments, num_positions, unions
from pypar.context_parallel.masks import Mask, Piece, pieces, work
from pypar.context_parallel.methods.heads import head_share
from pypar.context_parallel.methods.ring.route import KEYS, SUMS, Transfer, route
from pypar.context_parallel.methods.ring.sub_blocks import Round, SubBlock, rounds_of
from pypar.cost.machine import MachineCosts

# How often all-to-alls write what a rank has: they pack heads, join what came and put it in order. Backward autograd
# undoes each of these into zeros.
_EXCHANGE_WRITES = (3, 6)


@dataclass(frozen=True)
class Expected:
    """The operands of the formulas.

    bias_rows_bytes: of a bias with a row for each query, for one query of one head; 0 without.
    """

    sizes: Sizes
    queries: tuple[Segments, ...]
    keys: tuple[Segments, ...]
    mask: Mask
    costs: MachineCosts
    bias_rows_bytes: int = 0

    def seconds(self, method: str, a: int = 1) -> tuple[float, float]:
        """Forward and backward of ring, all_gather, ulysses, or hybrid with all-to-alls among `a` neighbours.

        ValueError: the layout has no chunks for a ring of what neighbours hold.
        """
        costs, size = self.costs, len(self.keys)
        if method == "ring":
            moved = self._ring_s(costs.speed_of(size))
        elif method == "all_gather":
            moved = self._all_gather_s()
        else:
            moved = self._shared_heads_s(size if method == "ulysses" else a)
        of_shared_heads = "ulysses" if method == "hybrid" else method
        started = costs.step_s(of_shared_heads) / 3
        forward, backward = (
            seconds + (1 + i) * started + costs.written_s(of_shared_heads, written)
            for i, (seconds, written) in enumerate(zip(moved, self.written(of_shared_heads), strict=True))
        )
        return forward, backward

    def written(self, method: str) -> tuple[float, float]:
        """Bytes that a rank packs and puts in order in its own memory, forward and backward.

        Of the ring inside ulysses not what it writes itself.
        """
        sizes, size = self.sizes, len(self.keys)
        rows, held = (max(num_positions(held) for held in x) for x in (self.queries, self.keys))
        keys, sums = sizes.keys_bytes(held), sizes.sums_bytes(held)
        item, wide = sizes.dtype.itemsize, sizes.wide.itemsize
        # Zeros to add to and their rounding, of out or dq.
        results = sizes.B * rows * sizes.N * max(sizes.H, sizes.Hv) * (wide + item)
        if method == "ring":
            hops = max(len(hops) for hops in route(self.queries, self.keys, self.mask).hops)
            # The block that is sent; zeros for the sums of each hop, and what came added to them.
            return results + keys * (hops > 1), results + 2 * sums * hops
        if method == "all_gather":
            # The own part, and all of them in order; zeros for sums, sums in their order, zeros for those.
            return results + keys * (1 + size), results + keys * (1 + size) + 3 * sums * size
        forward, backward = _EXCHANGE_WRITES
        return self._exchanged * forward, self._exchanged * backward

    @property
    def _exchanged(self) -> float:
        """Bytes of the q, k, v, out and lse that a rank holds, and of a bias with rows."""
        sizes, item = self.sizes, self.sizes.dtype.itemsize
        rows, held = (max(num_positions(held) for held in x) for x in (self.queries, self.keys))
        of_row = (sizes.H + sizes.Hv) * item + sizes.wide.itemsize + self.bias_rows_bytes
        return sizes.B * rows * sizes.N * of_row + sizes.keys_bytes(held)

    def _ring_s(self, bytes_per_s: float) -> tuple[float, float]:
        forward, backward = (_RingClock(self, bytes_per_s, backward).seconds() for backward in (False, True))
        return forward, backward

    def _all_gather_s(self) -> tuple[float, float]:
        sizes, costs, size = self.sizes, self.costs, len(self.keys)
        sent = volume.all_gather(sizes, self.queries, self.keys, self.mask)
        speed = costs.speed_of(size)
        gather_s = max(sent.forward) / sizes.G / speed + costs.latency_s
        scatter_s = (max(sent.backward) - max(sent.forward)) / sizes.G / speed + costs.latency_s
        gathered, times = self._gathered, []
        blocks = range(len(gathered.keys))
        for backward in (False, True):
            each_s = (
                sum(gathered.attention_s(rank, source, backward, sizes.N // sizes.G) for source in blocks)
                for rank in range(size)
            )
            compute_s = sizes.G * max(each_s)
            beside_s = (sizes.G - 1) * (gather_s + scatter_s * backward)
            hidden_s = max(compute_s + costs.own_share * beside_s, beside_s)
            times.append(gather_s + hidden_s + scatter_s * backward)
        return times[0], times[1]

    def _shared_heads_s(self, a: int) -> tuple[float, float]:
        """All-to-alls among `a` neighbours and, where they are not all ranks, a ring outside."""
        sizes, costs, size = self.sizes, self.costs, len(self.keys)
        shares = [head_share(sizes.N, sizes.G, index, a) for index in range(a)]
        most = max(shares, key=lambda s: s.queries.stop - s.queries.start)
        N, G = (heads.stop - heads.start for heads in (most.queries, most.groups))
        inner = replace(
            self,
            sizes=replace(sizes, N=N, G=G if most.expanded is None else N),
            queries=unions(self.queries, a, "this layout"),
            keys=unions(self.keys, a, "this layout"),
        )
        ring_s = inner._ring_s(costs.speed_of(size if a < size else 1))
        sent = volume.hybrid(sizes, self.queries, self.keys, self.mask, a)
        of_ring = volume.ring(inner.sizes, inner.queries, inner.keys, inner.mask)
        of_bias = sizes.B * max(num_positions(held) for held in self.queries) * sizes.N * self.bias_rows_bytes
        # q, k and v are one message; out and lse are one each where their dtypes differ.
        num_messages = 2 + (sizes.dtype != sizes.wide)
        exchanged_s = [
            (max(there) - max(ring) + of_bias * (a - 1) / a) / costs.speed_of(a)
            + num_messages * costs.latency_s
            for there, ring in ((sent.forward, of_ring.forward), (sent.backward, of_ring.backward))
        ]
        forward, backward = (
            seconds + exchange_s + costs.written_s("ring", written)
            for seconds, exchange_s, written in zip(ring_s, exchanged_s, inner.written("ring"), strict=True)
        )
        return forward, backward

    @property
    def _gathered(self) -> Expected:
        """What is expected with all keys as one block where they are chunks, else as they are."""
        chunks = all(segment.step == 1 for held in self.keys for segment in held)
        return replace(self, keys=unions(self.keys, len(self.keys), "this layout")) if chunks else self

    def attention_s(self, rank: int, source: int, backward: bool, N: int, share: float = 1.0) -> float:
        """The seconds of attention over N heads of a rank's queries and a share of the keys of `source`."""
        pairs, rows, calls = self._blocks[rank][source]
        sizes, costs = self.sizes, self.costs
        products = 3 * sizes.H + 2 * sizes.Hv if backward else sizes.H + sizes.Hv
        of_head_s = 2 * products * pairs * share / costs.flops_per_s + (1 + backward) * rows * costs.row_s
        return calls * costs.call_s + sizes.B * N * of_head_s

    @functools.cached_property
    def _blocks(self) -> list[list[tuple[int, int, int]]]:
        """Visible pairs, rows and calls of a rank's queries with another's keys."""
        return [[_counts(pieces(q, k, self.mask)) for k in self.keys] for q in self.queries]


def _counts(found: tuple[Piece, ...]) -> tuple[int, int, int]:
    return work(found), sum(piece.rows.stop - piece.rows.start for piece in found), len(found)


class _RingClock:
    """A ring's steps on all ranks. Of each rank: how far it is, when its link is free, what has come when."""

    def __init__(self, expected: Expected, bytes_per_s: float, backward: bool) -> None:
        self._expected, self._speed, self._backward = expected, bytes_per_s, backward
        self._now = [0.0] * len(expected.keys)
        self._free = [0.0] * len(expected.keys)
        self._arrived: dict[tuple[str, int, SubBlock, int], float] = {}  # kind, source, sub-block, receiver
        self._added: dict[tuple[int, int, SubBlock], float] = {}  # rank, source, sub-block

    def seconds(self) -> float:
        """Until the last rank is done."""
        expected, size = self._expected, len(self._expected.keys)
        sizes, longest = expected.sizes, max(num_positions(held) for held in expected.keys)
        table = route(expected.queries, expected.keys, expected.mask)
        transfers = table.backward if self._backward else table.forward
        for round_ in rounds_of(sizes.N, sizes.G, size, longest, expected.costs.near >= size):
            for hop in reversed(range(size)) if self._backward else range(size):
                ranks = [rank for rank in range(size) if hop in table.hops[rank]]
                self._hop(hop, ranks, transfers[hop], round_)
        return max([*self._now, *self._arrived.values()])

    def _hop(self, hop: int, ranks: list[int], transfers: tuple[Transfer, ...], round_: Round) -> None:
        """ranks: those that compute."""
        keys = [t for t in transfers if t.kind == KEYS]
        for transfer in transfers:
            for sub_block in round_.sub_blocks if transfer.kind == SUMS else ():
                self._send(transfer, sub_block)
        # The forward sends all of its own block before it computes.
        whole = hop == 0 and not self._backward
        for step in [round_.whole] if whole else round_.sub_blocks:
            for sub_block in round_.sub_blocks if whole else (step,):
                for transfer in keys:
                    self._send(transfer, sub_block)
            for rank in ranks:
                self._compute(rank, (rank - hop) % len(self._now), step)

    def _send(self, transfer: Transfer, sub_block: SubBlock) -> None:
        kind, source, sender, receiver = transfer
        sizes, begin_end = self._expected.sizes, sub_block.span(num_positions(self._expected.keys[source]))
        of_heads = replace(sizes, G=sub_block.heads.groups.stop - sub_block.heads.groups.start)
        num_bytes = (of_heads.keys_bytes if kind == KEYS else of_heads.sums_bytes)(
            begin_end[1] - begin_end[0]
        )
        if kind == KEYS:
            ready = max(self._now[sender], self._arrived.get((kind, source, sub_block, sender), 0.0))
        else:
            ready = self._added[sender, source, sub_block]
        transfer_s = num_bytes / self._speed
        self._free[sender] = max(self._free[sender], ready) + transfer_s
        self._arrived[kind, source, sub_block, receiver] = self._free[sender] + self._expected.costs.latency_s
        for rank in (sender, receiver):
            self._now[rank] += self._expected.costs.own_share * transfer_s / 2

    def _compute(self, rank: int, source: int, sub_block: SubBlock) -> None:
        N = sub_block.heads.queries.stop - sub_block.heads.queries.start
        share = (sub_block.end - sub_block.begin) / sub_block.of
        began = max(self._now[rank], self._arrived.get((KEYS, source, sub_block, rank), 0.0))
        ended = began + self._expected.attention_s(rank, source, self._backward, N, share)
        if source != rank:  # what came for the own block is added in the end
            ended = max(ended, self._arrived.get((SUMS, source, sub_block, rank), 0.0))
        self._now[rank] = self._added[rank, source, sub_block] = ended
