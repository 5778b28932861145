"""What each method of context parallelism takes; the method "auto", which takes the cheapest.

Bytes are those of `volume`, of the busiest rank; seconds are those of `seconds`, until the slowest rank is done.
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

from pypar.context_parallel.auto import volume
from pypar.context_parallel.auto.seconds import Expected
from pypar.context_parallel.auto.volume import Sizes, Volume
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.layouts import Segments, num_positions
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.methods.registry import methods
from pypar.cost.machine import MachineCosts, costs_of
from pypar.ops.uncompiled import uncompiled


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


@uncompiled("it is computed once for a shape, on the host")
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
    expected = Expected(sizes, queries, keys, mask, costs, bias_rows_bytes)
    held = (sizes, queries, keys, mask)
    size = len(keys)
    return (
        _cost("ring", {}, expected.seconds("ring"), volume.ring(*held)),
        _cost("all_gather", {}, expected.seconds("all_gather"), volume.all_gather(*held)),
        _of_shared_heads("ulysses", size, expected),
        *(_of_shared_heads("hybrid", a, expected) for a in range(2, size) if size % a == 0),
    )


def _of_shared_heads(method: str, a: int, expected: Expected) -> MethodCost:
    options = {"ulysses_size": a} if method == "hybrid" else {}
    if a > expected.sizes.N:
        return MethodCost(method, options, refused=f"{expected.sizes.N} query heads are fewer than {a} ranks")
    try:
        times = expected.seconds(method, a)
        sent = volume.hybrid(expected.sizes, expected.queries, expected.keys, expected.mask, a)
    except ValueError as error:
        return MethodCost(method, options, refused=str(error))
    return _cost(method, options, times, sent)


def _cost(method: str, options: Mapping[str, Any], times: tuple[float, float], sent: Volume) -> MethodCost:
    return MethodCost(method, options, times[0], times[1], max(sent.forward), max(sent.backward))


def cheapest(table: tuple[MethodCost, ...], *, backward: bool) -> MethodCost:
    """The cheapest of the methods that do not refuse, for a forward alone or with its backward; the first of equals."""
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


def choice(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[tuple[MethodCost, ...], MethodCost]:
    """The table of a call, and the method that it takes."""
    batch = q.shape[0] if q.dim() == 4 else 1
    sizes = Sizes(batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], q.dtype)
    costs = call.method_options.get("costs") or costs_of(call.axis, q.device, q.dtype)
    # Of the shape of this rank's bias only what is the same on all ranks: a rank may hold a single query.
    has_rows = call.bias is not None and (
        call.bias.shape[2] > 1 or any(num_positions(held) <= 1 for held in call.queries)
    )
    bias_bytes = call.bias.shape[3] * call.bias.itemsize if has_rows and call.bias is not None else 0
    table = method_costs(sizes, call.queries, call.keys, call.mask, costs, bias_bytes)
    leaves = (q, k, v, call.sinks, call.bias)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    return table, cheapest(table, backward=recorded)
