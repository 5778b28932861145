"""Bytes that a rank holds of a model whose states are cut over data ranks, by formula: ZeRO (arXiv 1910.02054).

A model is a list of units, which are gathered, reduced and freed together, and a root, which is around them. Parameters
are cut along dim 0 as torch.tensor_split cuts, so that what a rank holds is exact: the first ranks of an uneven cut
have one row more, and a parameter without dims is the first rank's.

    bytes of Psi parameters over N ranks    16 bits, as in the paper    16 bits, fp32 gradients    fp32
    stage 0                                 16 Psi                      18 Psi                     16 Psi
    stage 1: optimizer states               4 Psi + 12 Psi/N            6 Psi + 12 Psi/N           8 Psi + 8 Psi/N
    stage 2: and gradients                  2 Psi + 14 Psi/N            2 Psi + 16 Psi/N           4 Psi + 12 Psi/N
    stage 3: and parameters                 16 Psi/N                    18 Psi/N                   16 Psi/N

These always stay. What comes and goes in a step is told by `peaks`: whole parameters of the units that compute, whole
gradients of the units that are being reduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from pypar.spans import part


@dataclass(frozen=True)
class Parameter:
    """Its whole shape, on a rank of tensor parallelism that rank's part; the bytes of an element while it computes."""

    shape: tuple[int, ...]
    element_bytes: int = 4
    is_trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.element_bytes


Unit = Sequence[Parameter]


@dataclass(frozen=True)
class Units:
    """A model: its units in the order of a forward, and the root's parameters, used before them and after them."""

    units: Sequence[Unit]
    before: Unit = ()
    after: Unit = ()

    def parameters(self) -> Iterable[Parameter]:
        return chain(self.before, *self.units, self.after)


@dataclass(frozen=True)
class Sharding:
    """How states are cut: see `pypar.zero`. rank: of the data ranks, whose bytes are asked for."""

    stage: int = 0
    num_ranks: int = 1
    shard_size: int = 0
    reshard: bool = True
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.stage <= 3:
            raise ValueError(f"stage ({self.stage}) must be 0, 1, 2 or 3")
        if self.num_ranks < 1 or not 0 <= self.rank < self.num_ranks:
            raise ValueError(
                f"rank ({self.rank}) must be one of num_ranks ({self.num_ranks}), counted from 0"
            )
        if self.shard_size < 0 or self.num_ranks % (self.shard_size or 1):
            raise ValueError(
                f"shard_size ({self.shard_size}) must divide num_ranks ({self.num_ranks}), or be 0 for all of them"
            )

    @property
    def num_parts(self) -> int:
        """Ranks over which a tensor is cut."""
        return self.shard_size or self.num_ranks

    @property
    def num_copies(self) -> int:
        """Ranks that hold the same rows."""
        return self.num_ranks // self.num_parts

    def own(self, parameter: Parameter) -> int:
        """Elements of this rank's rows."""
        index = self.rank % self.num_parts
        if not parameter.shape:
            return int(index == 0)
        start, end = part(parameter.shape[0], index, self.num_parts)
        return (end - start) * math.prod(parameter.shape[1:])


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of an element of a gradient, of a master (there is one where parameters have fewer), of all moments."""

    gradient: int = 4
    master: int = 4
    moments: int = 8


ADAM = ElementBytes()  # pypar's: gradients and masters are fp32, and so are Adam's two moments
ZERO_PAPER = ElementBytes(gradient=2)  # section 3.1 of arXiv 1910.02054: fp16 gradients, K = 12


def states(model: Units, sharding: Sharding, each: ElementBytes = ADAM) -> dict[str, int]:
    """Bytes on this rank between steps: "parameters", "masters", "gradients", "moments"."""
    held = dict.fromkeys(("parameters", "masters", "gradients", "moments"), 0)
    for parameter in model.parameters():
        own, whole = sharding.own(parameter), parameter.numel
        held["parameters"] += (own if sharding.stage >= 3 else whole) * parameter.element_bytes
        if parameter.is_trained:
            updated = own if sharding.stage >= 1 else whole
            held["gradients"] += (own if sharding.stage >= 2 else whole) * each.gradient
            held["moments"] += updated * each.moments
            if parameter.element_bytes < each.master:
                held["masters"] += updated * each.master
    return held


def peaks(
    model: Units,
    sharding: Sharding,
    each: ElementBytes = ADAM,
    *,
    num_backwards: int = 1,
    num_ahead: int = 1,
) -> dict[str, int]:
    """The most bytes of each kind at any time of a step: those of `states`, and "gathered".

    num_backwards  of a step, whose gradients are added up whole before they are reduced
    num_ahead      units that are gathered before they are needed (of the first step: 0)

    The peaks of different kinds are not at one time: their sum is a bound.
    """
    most = states(model, sharding, each) | {"gathered": 0}
    if sharding.stage >= 2:
        most["gradients"] += _whole_gradients(model, each, num_backwards)
    if sharding.stage >= 3:
        most["gathered"] = _gathered(model, sharding, num_ahead)
    return most


def _gathered(model: Units, sharding: Sharding, num_ahead: int) -> int:
    """Whole parameters: the root's, and the units' that compute or are on their way, or are kept for their backward."""
    sizes = [sum(p.num_bytes for p in unit) for unit in model.units]
    root = sum(p.num_bytes for p in chain(model.before, model.after))
    if not sharding.reshard:
        return root + sum(sizes)
    at_once = 1 + num_ahead
    return root + max((sum(sizes[i : i + at_once]) for i in range(len(sizes))), default=0)


def _whole_gradients(model: Units, each: ElementBytes, num_backwards: int) -> int:
    """Whole gradients: a unit's are reduced while those of the one before arrive; some of the root's come last."""

    def size(unit: Unit) -> int:
        return sum(p.numel for p in unit if p.is_trained) * each.gradient

    sizes, before, after = [size(unit) for unit in model.units], size(model.before), size(model.after)
    if num_backwards > 1:
        return sum(sizes) + before + after
    inside = max((sum(pair) for pair in pairwise(sizes)), default=sum(sizes))
    return after + max(inside, before + (sizes[0] if sizes else 0))
