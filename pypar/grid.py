"""The ranks of a job as a grid with named axes: arithmetic alone, for any number of ranks, before one is started.

A grid has axes whose sizes multiply to the number of ranks, outermost first:

    Grid({"pp": pp, "dp": dp, "cp": cp, "tp": tp})      rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank

Other names are views of the same ranks:

    split={"tp": {"row": 2, "column": 2}}    axis tp as the product of two, outermost first (three: 2.5D and 3D)
    fold={"ep": (4, ("dp", "cp"))}           of the ranks of dp x cp four neighbours each: "ep", and "edp" for the rest
    stages="pp"                              parameters live on one rank of pp each; what is tied lives on its first and
                                             last one: "tied"

A product of axes is written as their names, outermost first. Its axes must be independent: "row" and "column" are, "ep"
and "edp" are, "ep" and "tp" are; "dp" and "ep" are not, for ep is made of the ranks of dp.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# What is spread over an axis wherever a job has it; what tensor parallelism cuts, its roles say.
STAGES = "pp"  # layers: parameters live on one rank each
SAMPLES = "dp"  # sequences of a batch
POSITIONS = "cp"  # positions of a sequence
DATA = (SAMPLES, POSITIONS)  # dense gradients are summed over them
TIED = "tied"  # the first and the last rank of the stages axis


@dataclass(frozen=True)
class _Member:
    """One axis of a family: axes whose product is that of the axes in ``support``."""

    support: tuple[str, ...]
    family: tuple[str, ...]
    inner: int  # ranks of the family's product between neighbours of this axis
    size: int


@dataclass(frozen=True, eq=False)
class Grid:
    """Sizes and names of the axes over a job's ranks; see the module for split, fold and stages.

    Raises ValueError for sizes that are not positive whole numbers, refinements that do not multiply to their axis,
    folds that do not divide theirs, and names that are used twice.
    """

    sizes: Mapping[str, int]
    split: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fold: Mapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    stages: str | None = None

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            check_size(name, size)
        for axis, parts in self.split.items():
            self._check_split(axis, parts)
        for name, (size, axes) in self.fold.items():
            self._check_fold(name, size, axes)
        names = [
            *self.sizes,
            *(name for parts in self.split.values() for name in parts),
            *(each for name in self.fold for each in (rest_of_fold(name), name)),
            *([TIED] if self.stages else []),
        ]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{name!r} cannot be the name of two axes of a mesh; give each a name of its own"
                )
        if self.stages is not None and self.stages not in self.sizes:
            raise ValueError(f"stages={self.stages!r} names no axis; use one of {', '.join(self.sizes)}")

    def _check_split(self, axis: str, parts: Mapping[str, int]) -> None:
        for name, size in parts.items():
            check_size(name, size)
        if axis not in self.sizes:
            raise ValueError(
                f"split refines an unknown axis {axis!r}; refine some of {', '.join(self.sizes)}"
            )
        if not parts:
            raise ValueError(f"axis {axis} is refined into nothing; name what it is the product of")
        if math.prod(parts.values()) != self.sizes[axis]:
            product = " x ".join(f"{name}={size}" for name, size in parts.items())
            raise ValueError(
                f"axis {axis}={self.sizes[axis]} is refined into {product}, which is {math.prod(parts.values())}; give "
                f"sizes whose product is {self.sizes[axis]}"
            )

    def _check_fold(self, name: str, size: int, axes: tuple[str, ...]) -> None:
        check_size(name, size)
        unknown = [axis for axis in axes if axis not in self.sizes]
        if unknown or not axes or list(axes) != [axis for axis in self.sizes if axis in axes]:
            raise ValueError(
                f"fold {name!r} is made of the axes {', '.join(axes) or 'none'}; use some of "
                f"{', '.join(self.sizes)}, each once and in this order"
            )
        order = list(self.sizes)
        between = order[order.index(axes[0]) : order.index(axes[-1])]
        if apart := [axis for axis in between if axis not in axes and self.sizes[axis] > 1]:
            raise ValueError(
                f"fold {name!r} is made of the axes {', '.join(axes)}, but {', '.join(apart)} lies between them; "
                f"fold axes that are neighbours in {', '.join(order)}"
            )
        total = math.prod(self.sizes[axis] for axis in axes)
        if total % size:
            small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
            divisors = ", ".join(map(str, sorted({*small, *(total // n for n in small)})))
            raise ValueError(
                f"{name}={size} must divide {' x '.join(axes)} ({total}), whose ranks it folds; use one of {divisors}"
            )

    @functools.cached_property
    def _key(self) -> tuple[object, ...]:
        """What makes two grids one: the order of axes and of an axis's parts counts, unlike a dict's."""
        parts = sorted((axis, tuple(parts.items())) for axis, parts in self.split.items())
        return tuple(self.sizes.items()), tuple(parts), tuple(sorted(self.fold.items())), self.stages

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Grid) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes.values())

    @functools.cached_property
    def _members(self) -> dict[str, _Member]:
        members = {name: _Member((name,), (name,), 1, size) for name, size in self.sizes.items()}
        for axis, parts in self.split.items():
            inner = 1
            for name, size in reversed(list(parts.items())):
                members[name] = _Member((axis,), tuple(parts), inner, size)
                inner *= size
        for name, (size, axes) in self.fold.items():
            family, total = (rest_of_fold(name), name), math.prod(self.sizes[axis] for axis in axes)
            members[name] = _Member(axes, family, 1, size)
            members[family[0]] = _Member(axes, family, size, total // size)
        if self.stages is not None:
            members[TIED] = _Member((self.stages,), (TIED,), 1, min(2, self.sizes[self.stages]))
        return members

    @functools.cached_property
    def _strides(self) -> dict[str, int]:
        """Ranks between neighbours of each axis."""
        sizes = list(self.sizes.values())
        return {name: math.prod(sizes[index + 1 :]) for index, name in enumerate(self.sizes)}

    @property
    def names(self) -> tuple[str, ...]:
        """All axes: those of `sizes` as they stand there, then refinements, folds, and "tied"."""
        return (*self.sizes, *(name for name in self._members if name not in self.sizes))

    def check_product(self, axes: Iterable[str]) -> None:
        """Raise ValueError unless the grid has these axes and they are independent."""
        axes = tuple(axes)
        for name in axes:
            if name not in self._members:
                close = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}" if close else f"it has {', '.join(self.names)}"
                raise ValueError(f"the mesh has no axis {name!r}; {hint}")
        for first, second in itertools.combinations(axes, 2):
            a, b = self._members[first], self._members[second]
            if first == second or (set(a.support) & set(b.support) and a.family != b.family):
                why = "it is there twice" if first == second else f"{first} and {second} share ranks"
                raise ValueError(
                    f"axes {', '.join(axes)} are not independent: {why}; use axes of one view of the ranks"
                )

    def size(self, *axes: str) -> int:
        """Ranks of a product of axes; of "tied", on the stages that hold what is tied."""
        self.check_product(axes)
        return math.prod(self._members[name].size for name in axes)

    def coordinate(self, rank: int, *axes: str) -> int:
        """The index of a rank on a product of axes; on "tied" 0 for all stages but the last."""
        self.check_product(axes)
        index = 0
        for name in axes:
            index = index * self._members[name].size + self._on_axis(rank, name)
        return index

    def _on_axis(self, rank: int, name: str) -> int:
        member = self._members[name]
        flat = 0
        for axis in member.support:
            flat = flat * self.sizes[axis] + rank // self._strides[axis] % self.sizes[axis]
        if name == TIED:
            return int(flat == self.sizes[member.support[0]] - 1 > 0)
        return flat // member.inner % member.size

    def in_order(self, axes: Iterable[str]) -> tuple[str, ...]:
        """A product's axes, outermost first as the ranks lie."""
        axes = tuple(axes)
        self.check_product(axes)
        order = list(self.sizes)
        return tuple(
            sorted(axes, key=lambda n: (order.index(self._members[n].support[0]), -self._members[n].inner))
        )

    def others(self, *axes: str) -> tuple[str, ...]:
        """The axes that with these make up the whole grid; ranks of a product's group agree on them."""
        self.check_product(axes)
        families = [self._members[name].family for name in axes]
        covered = {axis for name in axes for axis in self._members[name].support}
        siblings = [name for family in dict.fromkeys(families) for name in family if name not in axes]
        return (*(name for name in self.sizes if name not in covered), *siblings)

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks of a product of axes that this rank is one of, in their order on it."""
        return next(group for group in self.groups(*axes) if rank in group)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups of a product of axes: every rank is in one of them."""
        others = self.others(*axes)
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            key = [self._on_axis(rank, name) for name in others]
            if TIED in axes:
                stage = self._on_axis(rank, str(self.stages))
                key.append(0 if self._on_axis(rank, TIED) else stage)
            members.setdefault(tuple(key), []).append(rank)
        return tuple(
            tuple(sorted(ranks, key=lambda rank: [self._on_axis(rank, name) for name in axes]))
            for ranks in members.values()
        )


class SimulatedRank(NamedTuple):
    """A rank of a grid where no process need be: what a Mesh and an Axis know of themselves, for any rank."""

    grid: Grid
    rank: int


def rest_of_fold(name: str) -> str:
    """The name of the axis that a fold leaves of the ranks it folds: "ep" leaves "edp"."""
    return f"{name.removesuffix('p')}dp"


def check_size(name: str, size: int) -> None:
    """Raise ValueError unless the size of an axis is a positive whole number."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"mesh axis {name}={size!r} must be a positive whole number; use {name}=1 to leave the axis out"
        )
