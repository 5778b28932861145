"""What each method of context parallelism takes, by formula; the method "auto", which takes the cheapest.

Bytes are those of `volume`, work is the visible pairs of `masks`, both of the busiest rank. With P the time of its
attention and C that of its communication, in each direction:

    ring        the transfers of a hop hide behind its attention, but for one hop: max(P, C + P / hops)
    all_gather  one step of G has nothing to hide behind: C / G + max(P, C - C / G)
    ulysses     nothing hides: C + P
    hybrid      the all-to-alls show, the ring hides

Whatever goes in is the same on every rank, so all choose alike and need not ask each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any

import torch
from torch import Tensor

from pypar.context_parallel import volume
from pypar.context_parallel.call import Call, Method, refuse_options
from pypar.context_parallel.heads import head_share
from pypar.context_parallel.layouts import Segments, num_positions, unions
from pypar.context_parallel.machine_costs import MachineCosts, costs_of
from pypar.context_parallel.masks import Mask, pieces, work
from pypar.context_parallel.methods import methods
from pypar.context_parallel.route import route
from pypar.context_parallel.volume import Sizes, Volume


@dataclass(frozen=True)
class MethodCost:
    """Seconds that a method is expected to take, and bytes that its busiest rank sends. refused: why it cannot run."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    forward_s: float = math.inf
    backward_s: float = math.inf
    forward_bytes: int = 0
    backward_bytes: int = 0
    refused: str | None = None

    @property
    def name(self) -> str:
        sizes = "".join(f" {key}={value}" for key, value in self.options.items())
        return self.method + sizes


@functools.lru_cache(maxsize=256)
def method_costs(
    sizes: Sizes,
    queries: tuple[Segments, ...],
    keys: tuple[Segments, ...],
    mask: Mask,
    costs: MachineCosts,
    bias_rows_bytes: int = 0,
) -> tuple[MethodCost, ...]:
    """The cost of every method, the hybrid in every size.

    queries, keys: what each rank holds (`layouts.segments_of`), by rank. bias_rows_bytes: of a bias with a row for
    each query, for one query of one head; 0 without.
    """
    size = len(keys)
    plan = _Plan(sizes, queries, keys, mask, costs, bias_rows_bytes)
    found = [plan.ring(), plan.all_gather(), plan.shared_heads("ulysses", size)]
    inner = [a for a in range(2, size) if size % a == 0]
    return (*found, *(plan.shared_heads("hybrid", a) for a in inner))


def cheapest(table: tuple[MethodCost, ...], *, backward: bool) -> MethodCost:
    """Of the methods that do not refuse, for a forward alone or with its backward; the first of equals."""
    return min(
        (cost for cost in table if cost.refused is None),
        key=lambda cost: cost.forward_s + (cost.backward_s if backward else 0.0),
    )


def explained(table: tuple[MethodCost, ...], chosen: MethodCost) -> str:
    """The table as text, a line for each method."""
    lines = [f"  {'method':24}{'forward':>12}{'backward':>12}{'sent there':>14}{'back':>12}"]
    for cost in table:
        mark = "*" if cost == chosen else " "
        if cost.refused is not None:
            lines.append(f"{mark} {cost.name:24} no: {cost.refused}")
            continue
        times = "".join(f"{s * 1e3:9.3f} ms" for s in (cost.forward_s, cost.backward_s))
        sent = "".join(f"{b / 1e6:9.2f} MB" for b in (cost.forward_bytes, cost.backward_bytes))
        lines.append(f"{mark} {cost.name:24}{times}  {sent}")
    return "\n".join(lines)


def auto(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`: the cheapest of the others by `method_costs`.

    Options: explain, True prints the table on the first rank; costs, a `MachineCosts` in place of what
    `measure_costs` found or of the defaults.
    """
    refuse_options("auto", call.method_options, ("explain", "costs"))
    table, chosen = choice(q, k, v, call)
    if call.method_options.get("explain") and call.axis.rank == 0:
        print(explained(table, chosen), flush=True)  # noqa: T201 - asked for
    return methods()[chosen.method](q, k, v, replaced(call, method_options=dict(chosen.options)))


METHODS: dict[str, Method] = {"auto": auto}


def choice(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[tuple[MethodCost, ...], MethodCost]:
    """The table of a call, and the method that it takes."""
    batch = q.shape[0] if q.dim() == 4 else 1
    sizes = Sizes(batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], q.dtype)
    costs = call.method_options.get("costs") or costs_of(call.axis, q.device)
    # Of the shape of this rank's bias only what is the same on all ranks: a rank may hold a single query.
    has_rows = call.bias is not None and (
        call.bias.shape[2] > 1 or any(num_positions(held) <= 1 for held in call.queries)
    )
    bias_bytes = call.bias.shape[3] * call.bias.itemsize if has_rows and call.bias is not None else 0
    table = method_costs(sizes, call.queries, call.keys, call.mask, costs, bias_bytes)
    leaves = (q, k, v, call.sinks, call.bias)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    return table, cheapest(table, backward=recorded)


@dataclass(frozen=True)
class _Plan:
    """The operands of the formulas. pairs[r][s]: how many keys of rank s queries of rank r see, summed."""

    sizes: Sizes
    queries: tuple[Segments, ...]
    keys: tuple[Segments, ...]
    mask: Mask
    costs: MachineCosts
    bias_rows_bytes: int

    @functools.cached_property
    def pairs(self) -> Tensor:
        return torch.tensor(
            [[work(pieces(q, k, self.mask)) for k in self.keys] for q in self.queries], dtype=torch.float64
        )

    def ring(self) -> MethodCost:
        sent = volume.ring(self.sizes, self.queries, self.keys, self.mask)
        hops = max(len(hops) for hops in route(self.queries, self.keys, self.mask).hops)
        busiest = float(self.pairs.sum(1).max())
        times = self._ring_times(sent, busiest, self.sizes.N, hops, self.costs.speed_of(len(self.keys)))
        return _cost("ring", {}, times, sent)

    def all_gather(self) -> MethodCost:
        sizes, costs = self.sizes, self.costs
        sent = volume.all_gather(sizes, self.queries, self.keys, self.mask)
        speed = costs.speed_of(len(self.keys))
        apart = any(segment.step > 1 for held in self.keys for segment in held)  # a call for each rank's keys
        calls = sizes.G * (len(self.keys) if apart else 1)
        times = []
        for compute_s, each in zip(
            self._attention_times(float(self.pairs.sum(1).max()), sizes.N, calls),
            (max(sent.forward), max(sent.backward)),
            strict=True,
        ):
            step_s = each / sizes.G / speed + costs.latency_s
            times.append(step_s + max(compute_s, step_s * (sizes.G - 1)))
        return _cost("all_gather", {}, times, sent)

    def shared_heads(self, method: str, a: int) -> MethodCost:
        """Ulysses among a neighbours and, where they are not all ranks, a ring outside."""
        sizes, costs, size = self.sizes, self.costs, len(self.keys)
        options = {"ulysses_size": a} if method == "hybrid" else {}
        if a > sizes.N:
            return MethodCost(method, options, refused=f"{sizes.N} query heads are fewer than {a} ranks")
        try:
            queries, keys = (unions(x, a, "this layout") for x in (self.queries, self.keys))
        except ValueError as error:
            return MethodCost(method, options, refused=str(error))
        sent = volume.hybrid(sizes, self.queries, self.keys, self.mask, a)
        most = max(
            (head_share(sizes.N, sizes.G, i, a) for i in range(a)),
            key=lambda s: s.queries.stop - s.queries.start,
        )
        N, G = (heads.stop - heads.start for heads in (most.queries, most.groups))
        share = replaced(sizes, N=N, G=G if most.expanded is None else N)
        of_ring = volume.ring(share, queries, keys, self.mask)
        outer = self.pairs.unflatten(0, (-1, a)).sum(1).sum(1)
        hops = max(len(hops) for hops in route(queries, keys, self.mask).hops)
        ring_speed = costs.speed_of(size if a < size else 1)
        times = self._ring_times(of_ring, float(outer.max()), N, hops, ring_speed)
        rows = max(num_positions(x) for x in self.queries) * sizes.B * sizes.N * self.bias_rows_bytes
        shown = []
        for time_s, total, ring in zip(
            times, (sent.forward, sent.backward), (of_ring.forward, of_ring.backward), strict=True
        ):
            exchanged = max(total) - max(ring) + rows * (a - 1) // a
            shown.append(time_s + exchanged / costs.speed_of(a) + 2 * costs.latency_s)
        return _cost(method, options, shown, sent)

    def _ring_times(self, sent: Volume, busiest: float, N: int, hops: int, bytes_per_s: float) -> list[float]:
        times = []
        for compute_s, each in zip(
            self._attention_times(busiest, N, hops), (max(sent.forward), max(sent.backward)), strict=True
        ):
            transfer_s = each / bytes_per_s + (hops - 1) * self.costs.latency_s
            times.append(max(compute_s, transfer_s + compute_s / hops))
        return times

    def _attention_times(self, pairs: float, N: int, calls: int) -> tuple[float, float]:
        """Forward takes 2 products of a tile, backward 5."""
        sizes, costs = self.sizes, self.costs
        each = 2 * pairs * sizes.B * N
        return (
            each * (sizes.H + sizes.Hv) / costs.flops_per_s + calls * costs.call_s,
            each * (3 * sizes.H + 2 * sizes.Hv) / costs.flops_per_s + calls * costs.call_s,
        )


def _cost(method: str, options: Mapping[str, Any], times: list[float], sent: Volume) -> MethodCost:
    return MethodCost(method, options, times[0], times[1], max(sent.forward), max(sent.backward))
