"""Seconds that each method takes, by formulas of shapes, layout, mask and what a machine costs.

    attention    2 products of visible pairs forward, 5 backward; a share for each query of each call; a share for
                 each call
    transfer     bytes / speed + latency; while it is in flight the ranks at its ends compute, but for its `own_share`
    ring         every step of every rank in order: what it sends, what it waits for, its attention
    all_gather   the first gather and, backward, the last scatter have nothing to hide behind; the others do
    ulysses      nothing hides: two all-to-alls and the attention of some heads over all positions
    hybrid       the all-to-alls among neighbours show, the ring is a ring

What a method packs and puts in order is counted too: the bytes that it writes in its own memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pypar.context_parallel import volume
from pypar.context_parallel.heads import head_share
from pypar.context_parallel.layouts import Segments, num_positions, unions
from pypar.context_parallel.machine_costs import MachineCosts
from pypar.context_parallel.masks import Mask, pieces, work
from pypar.context_parallel.parts import parts_of
from pypar.context_parallel.route import KEYS, SUMS, Transfer, route
from pypar.context_parallel.volume import Sizes

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
        forward, backward = (_Walk(self, bytes_per_s, backward).seconds() for backward in (False, True))
        return forward, backward

    def _all_gather_s(self) -> tuple[float, float]:
        sizes, costs, size = self.sizes, self.costs, len(self.keys)
        sent = volume.all_gather(sizes, self.queries, self.keys, self.mask)
        speed = costs.speed_of(size)
        gather_s = max(sent.forward) / sizes.G / speed + costs.latency_s
        scatter_s = (max(sent.backward) - max(sent.forward)) / sizes.G / speed + costs.latency_s
        times = []
        for backward in (False, True):
            compute_s = max(self._of_gathered_s(rank, backward) for rank in range(size))
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
        # q, k and v are one message; out and lse are one each where their dtypes differ.
        num_messages = 2 + (sizes.dtype != sizes.wide)
        exchange_s = self._exchanged * (a - 1) / a / costs.speed_of(a) + num_messages * costs.latency_s
        forward, backward = (
            seconds + exchange_s + costs.written_s("ring", written)
            for seconds, written in zip(ring_s, inner.written("ring"), strict=True)
        )
        return forward, backward

    def _of_gathered_s(self, rank: int, backward: bool) -> float:
        """Some heads after the others, of all keys as one block where they are chunks, else of each rank's."""
        sizes = self.sizes
        if all(segment.step == 1 for held in self.keys for segment in held):
            whole = replace(self, keys=unions(self.keys, len(self.keys), "this layout"))
            blocks = [(whole, 0)]
        else:
            blocks = [(self, source) for source in range(len(self.keys))]
        each = sum(plan.attention_s(rank, source, backward, sizes.N // sizes.G) for plan, source in blocks)
        return sizes.G * each

    def attention_s(self, rank: int, source: int, backward: bool, N: int, share: int = 1) -> float:
        """Of a rank's queries, N of their heads, and 1 / share of a rank's keys."""
        found = pieces(self.queries[rank], self.keys[source], self.mask)
        sizes, costs = self.sizes, self.costs
        products = 3 * sizes.H + 2 * sizes.Hv if backward else sizes.H + sizes.Hv
        rows = sum(piece.rows.stop - piece.rows.start for piece in found)
        of_heads_s = 2 * products * work(found) / share / costs.flops_per_s + rows * costs.row_s * (
            1 + backward
        )
        return len(found) * costs.call_s + sizes.B * N * of_heads_s


class _Walk:
    """A ring's steps on all ranks. Of each rank: when it is where it is, when its link is free, what came when."""

    def __init__(self, plan: Expected, bytes_per_s: float, backward: bool) -> None:
        self._plan, self._speed, self._backward = plan, bytes_per_s, backward
        self._size = len(plan.keys)
        sizes, longest = plan.sizes, max(num_positions(held) for held in plan.keys)
        self._parts = parts_of(sizes.N, sizes.G, self._size, longest, plan.costs.near >= self._size)
        self._now = [0.0] * self._size
        self._free = [0.0] * self._size
        self._arrived: dict[tuple[str, int, int, int], float] = {}  # kind, source, part, receiver
        self._added: dict[tuple[int, int, int], float] = {}  # rank, source, part

    def seconds(self) -> float:
        plan, size = self._plan, self._size
        table = route(plan.queries, plan.keys, plan.mask)
        rounds = table.backward if self._backward else table.forward
        everything = range(len(self._parts))
        for hop in reversed(range(size)) if self._backward else range(size):
            # The forward sends all of its own block before it computes.
            whole = hop == 0 and not self._backward
            for transfer in rounds[hop]:
                for part in everything if whole or transfer.kind == SUMS else ():
                    self._send(transfer, part)
            for part in everything:
                for transfer in rounds[hop]:
                    if transfer.kind == KEYS and not whole:
                        self._send(transfer, part)
                for rank in range(size):
                    if hop in table.hops[rank]:
                        self._compute(rank, (rank - hop) % size, part)
        return max(self._now)

    def _bytes(self, kind: str, source: int) -> float:
        """Of a part."""
        sizes, positions = self._plan.sizes, num_positions(self._plan.keys[source])
        whole = sizes.keys_bytes(positions) if kind == KEYS else sizes.sums_bytes(positions)
        return whole / len(self._parts)

    def _send(self, transfer: Transfer, part: int) -> None:
        kind, source, sender, receiver = transfer
        if kind == KEYS:
            ready = max(self._now[sender], self._arrived.get((kind, source, part, sender), 0.0))
        else:
            ready = self._added[sender, source, part]
        transfer_s = self._bytes(kind, source) / self._speed
        self._free[sender] = max(self._free[sender], ready) + transfer_s
        self._arrived[kind, source, part, receiver] = self._free[sender] + self._plan.costs.latency_s
        for rank in (sender, receiver):
            self._now[rank] += self._plan.costs.own_share * transfer_s / 2

    def _compute(self, rank: int, source: int, part: int) -> None:
        plan, heads = self._plan, self._parts[part].heads.queries
        count = self._parts[part].count
        N = heads.stop - heads.start
        if source == rank and not self._backward:  # whole, at once
            if part > 0:
                return
            N, count = plan.sizes.N, 1
        arrived = self._arrived.get((KEYS, source, part, rank), 0.0)
        ended = max(self._now[rank], arrived) + plan.attention_s(rank, source, self._backward, N, count)
        ended = max(ended, self._arrived.get((SUMS, source, part, rank), 0.0))
        self._now[rank] = self._added[rank, source, part] = ended
