"""Bytes that each rank sends: formulas of shapes, layout and mask, for all methods. Tests hold counters to them.

With K the bytes of one rank's k and v and D the bytes of their gradients in fp32, a ring of R ranks whose mask
hides nothing sends (R-1) K forward and (R-2) K + (R-1) D backward on every rank. With contiguous chunks and a
causal mask rank r sends (r+1) K forward, the last one nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pypar.comm import wire_bytes
from pypar.context_parallel.agreement import agreement_bytes as agreement_bytes
from pypar.context_parallel.layouts import Segments, num_positions, unions
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.methods.heads import HeadShare, head_share
from pypar.context_parallel.methods.ring.route import KEYS, Transfer, route


@dataclass(frozen=True)
class Sizes:
    """batch size B (1 with documents), N query heads, G key/value heads, head sizes H and Hv, dtype of q, k and v."""

    B: int
    N: int
    G: int
    H: int
    Hv: int
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which gradients travel."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def keys_bytes(self, positions: int) -> int:
        """The bytes of k and v of so many positions."""
        return self.B * positions * self.G * (self.H + self.Hv) * self.dtype.itemsize

    def sums_bytes(self, positions: int) -> int:
        """The bytes of dk and dv of so many positions, as they travel."""
        return self.B * positions * self.G * (self.H + self.Hv) * self.wide.itemsize


@dataclass(frozen=True)
class Volume:
    """Bytes sent by each rank, by rank, without the check that the ranks agree (`agreement_bytes`)."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


def ring(sizes: Sizes, queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask) -> Volume:
    """queries, keys: what each rank holds, by rank."""
    table = route(queries, keys, mask)

    def sent(rounds: tuple[tuple[Transfer, ...], ...]) -> tuple[int, ...]:
        totals = [0] * len(keys)
        for transfers in rounds:
            for transfer in transfers:
                positions = num_positions(keys[transfer.source])
                size = sizes.keys_bytes if transfer.kind == KEYS else sizes.sums_bytes
                totals[transfer.sender] += size(positions)
        return tuple(totals)

    return Volume(sent(table.forward), sent(table.backward))


def all_gather(sizes: Sizes, queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask) -> Volume:
    """The mask does not matter: every rank gets all keys. Parts are padded to the longest one's positions."""
    size, most = len(keys), max(num_positions(part) for part in keys)
    heads_bytes = [x // sizes.G for x in (sizes.keys_bytes(most), sizes.sums_bytes(most))]
    gathered, scattered = (
        sizes.G * wire_bytes(collective, size * part, size)
        for collective, part in zip(("all_gather", "reduce_scatter"), heads_bytes, strict=True)
    )
    return Volume((gathered,) * size, (gathered + scattered,) * size)


def ulysses(sizes: Sizes, queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask) -> Volume:
    """Without a bias that has rows, which goes with q: [B, T, N, S]."""
    return hybrid(sizes, queries, keys, mask, len(keys))


def hybrid(
    sizes: Sizes, queries: tuple[Segments, ...], keys: tuple[Segments, ...], mask: Mask, ulysses_size: int
) -> Volume:
    """The all-to-alls among ulysses_size neighbours there and back, and their ring."""
    size, a = len(keys), ulysses_size
    shares = [head_share(sizes.N, sizes.G, index, a) for index in range(a)]
    if a == size:
        rings = [Volume((0,), (0,))] * a
    else:
        held_q, held_k = (unions(x, a, "this layout") for x in (queries, keys))
        rings = [ring(_of_share(sizes, share), held_q, held_k, mask) for share in shares]
    forward, backward = [], []
    for rank in range(size):
        mine, inner, first = shares[rank % a], rank % a, rank // a * a
        others = [i for i in range(a) if i != inner]
        out_there = sum(_inputs_bytes(sizes, shares[i], queries[rank], keys[rank]) for i in others)
        out_back = sum(_results_bytes(sizes, mine, queries[first + i]) for i in others)
        in_there = sum(_results_bytes(sizes, shares[i], queries[rank]) for i in others)
        in_back = sum(_inputs_bytes(sizes, mine, queries[first + i], keys[first + i]) for i in others)
        forward.append(out_there + out_back + rings[inner].forward[rank // a])
        backward.append(in_there + in_back + rings[inner].backward[rank // a])
    return Volume(tuple(forward), tuple(backward))


def _of_share(sizes: Sizes, share: HeadShare) -> Sizes:
    N, G = (heads.stop - heads.start for heads in (share.queries, share.groups))
    return replace(sizes, N=N, G=G if share.expanded is None else N)


def _inputs_bytes(sizes: Sizes, share: HeadShare, queries: Segments, keys: Segments) -> int:
    """The bytes of these positions' q, k and v, or of their gradients, for some heads."""
    N, G = (heads.stop - heads.start for heads in (share.queries, share.groups))
    q, kv = num_positions(queries) * N * sizes.H, num_positions(keys) * G * (sizes.H + sizes.Hv)
    return sizes.B * (q + kv) * sizes.dtype.itemsize


def _results_bytes(sizes: Sizes, share: HeadShare, queries: Segments) -> int:
    """The bytes of these positions' out and lse, or of their gradients, for some heads."""
    N = share.queries.stop - share.queries.start
    return sizes.B * num_positions(queries) * N * (sizes.Hv * sizes.dtype.itemsize + sizes.wide.itemsize)
