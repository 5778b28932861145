"""Bytes that a rank sends in a step for a model whose states are cut over data ranks, by formula.

For Psi parameters over N ranks, in elements and for N -> infinity (a factor (N - 1)/N is left out here, and not below):

    stage 0        2 Psi: an all-reduce of gradients
    stages 1, 2    Psi + Psi: a reduce-scatter of gradients, an all-gather of updated parameters
    stage 3        M (2 Psi) + Psi: gathers before each of M forwards and backwards, a reduce-scatter

Where the ranks that cut are fewer than all (hybrid), a rank's rows of gradients are summed over the ranks that hold the
same ones: 2 (R - 1)/R Psi/N more, over R groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pypar.comm.traffic import wire_bytes
from pypar.cost.memory import ADAM, ElementBytes, Parameter, Sharding, Units


@dataclass(frozen=True)
class Sent:
    """Bytes by collective: among the ranks over which states are cut, and among those that hold the same rows."""

    inside: dict[str, int]
    outside: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.inside.values()) + sum(self.outside.values())


def sent(model: Units, sharding: Sharding, each: ElementBytes = ADAM, *, num_backwards: int = 1) -> Sent:
    """Bytes that this rank sends in a step of so many forwards and backwards, whose gradients are added up whole.

    As `pypar.comm.traffic.Traffic` counts them, but that a collective's bytes are rounded down to a whole number: they
    may be fewer by less than one for each collective.
    """
    trained = [p for p in model.parameters() if p.is_trained]
    whole = sum(p.numel for p in trained) * each.gradient
    if sharding.stage == 0:
        return Sent({"all_reduce": wire_bytes("all_reduce", whole, sharding.num_ranks)}, {})
    parts = sharding.num_parts
    inside = {"reduce_scatter": wire_bytes("reduce_scatter", whole, parts)}
    own = sum(sharding.own(p) for p in trained) * each.gradient
    outside = {"all_reduce": wire_bytes("all_reduce", own, sharding.num_copies)}
    inside["all_gather"] = wire_bytes("all_gather", _gathered(model, sharding, trained, num_backwards), parts)
    return Sent(inside, outside)


def _gathered(model: Units, sharding: Sharding, trained: Iterable[Parameter], num_backwards: int) -> int:
    """Bytes of all that is gathered in a step: updated parameters once, or units before each forward and backward."""
    if sharding.stage < 3:
        return sum(p.num_bytes for p in trained)
    units = sum(p.num_bytes for unit in model.units for p in unit)
    root = sum(p.num_bytes for p in (*model.before, *model.after))
    return num_backwards * (root + units * (2 if sharding.reshard else 1))
