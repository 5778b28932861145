"""What a mesh is made of, in words and as numbers, before a rank is there: axes, their refinements, folds of them.

A shape is written as text, its axes in any order:

    dp=4,tp=2                        sizes of axes; those that are not named are 1
    dp=4,tp=4(row=2,column=2)        axis tp refined into two, outermost first; their product is tp's size
    dp=4,cp=2,pair=2(dp,cp)          a fold: two neighbours each of dp x cp are on "pair", the rest is "pairdp"
    dp=4,ep=2                        the fold "ep", whose axes are known (`FOLDS`)

This file needs no torch.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pypar.grid import DATA, POSITIONS, SAMPLES, STAGES, Grid, check_size, rest_of_fold

AXIS_NAMES = (STAGES, SAMPLES, POSITIONS, "tp")  # outermost first
# Folds that every mesh has, and the axes whose ranks they fold: of size 1 where nothing else is said.
FOLDS = {"ep": DATA}
# What a Mesh has beside its axes.
RESERVED = frozenset(
    {"axis", "data", "declare", "device_mesh", "grid", "of", "rank", "refined", "shape", "sizes", "world"}
)

MOST_RANKS = 1 << 20  # that a text may give to an axis: an error of typing is said at once

Split = Mapping[str, Mapping[str, int]]
Fold = Mapping[str, tuple[int, tuple[str, ...]]]


@dataclass(frozen=True, eq=False)
class MeshShape:
    """Sizes of the axes (1 where they are not named), refinements {axis: {name: size}}, folds {name: (size, axes)}.

    Raises ValueError for an unknown axis, and for sizes, refinements, folds and names that cannot be.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    split: Split = field(default_factory=dict)
    fold: Fold = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.sizes:
            if name not in AXIS_NAMES:
                raise ValueError(f"a mesh has no axis {name!r}; {_known(name)}")
        for name in self.grid.names:
            if name in RESERVED or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
                raise ValueError(f"an axis of a mesh cannot be called {name!r}; use another name")

    def __eq__(self, other: object) -> bool:
        return self.grid == other.grid if isinstance(other, MeshShape) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.grid)

    @functools.cached_property
    def grid(self) -> Grid:
        """The arithmetic of the ranks."""
        return Grid(
            {name: self.sizes.get(name, 1) for name in AXIS_NAMES},
            split={axis: dict(parts) for axis, parts in self.split.items()},
            fold={name: (1, axes) for name, axes in FOLDS.items()} | dict(self.fold),
            stages=STAGES,
        )

    @property
    def views(self) -> dict[str, str]:
        """What refinements and folds add to the axes, where they have more than one rank: name -> as it is written."""
        parts = {name: _split_text(axis, self) for axis, names in self.split.items() for name in names}
        folds = {each: _fold_text(name, self) for name in self.fold for each in (name, rest_of_fold(name))}
        return {name: text for name, text in (parts | folds).items() if self.grid.size(name) > 1}

    def __str__(self) -> str:
        """The text that `parse_mesh` reads, axes of size 1 left out; "tp=1" for one rank."""
        axes = [
            _split_text(name, self) if name in self.split else f"{name}={size}"
            for name, size in self.grid.sizes.items()
            if size > 1 or name in self.split
        ]
        folds = [
            _fold_text(name, self)
            for name, (size, given) in self.fold.items()
            if size > 1 or FOLDS.get(name) != given
        ]
        return ",".join(axes + folds) or "tp=1"


def _split_text(axis: str, shape: MeshShape) -> str:
    parts = ",".join(f"{name}={size}" for name, size in shape.split[axis].items())
    return f"{axis}={shape.grid.size(axis)}({parts})"


def _fold_text(name: str, shape: MeshShape) -> str:
    size, axes = shape.fold[name]
    return f"{name}={size}" + ("" if FOLDS.get(name) == axes else f"({','.join(axes)})")


def mesh_shape(sizes: Mapping[str, int], split: Split | None = None, fold: Fold | None = None) -> MeshShape:
    """A shape whose sizes may also name folds of `FOLDS`: {"dp": 4, "ep": 2}."""
    folds = dict(fold or {})
    for name in FOLDS.keys() & sizes.keys():
        check_size(name, sizes[name])
        if sizes[name] > 1 and name in folds:
            raise ValueError(
                f"{name}={sizes[name]} and fold={folds} both say what {name} is; give one of them"
            )
        if sizes[name] > 1:
            folds[name] = (sizes[name], FOLDS[name])
    return MeshShape({name: size for name, size in sizes.items() if name not in FOLDS}, split or {}, folds)


def mesh_grid(sizes: Mapping[str, int], split: Split | None = None, fold: Fold | None = None) -> Grid:
    """The arithmetic of a `Mesh` of these sizes, without its ranks: to plan, refuse and test before they start."""
    return mesh_shape(sizes, split, fold).grid


def parse_mesh(text: str) -> MeshShape:
    """Read "dp=4,tp=4(row=2,column=2),ep=2", see the head of this file; `str` of the result writes it.

    ValueError for an unknown or repeated name, a size that is not a positive whole number, parentheses that do not
    close, and what `MeshShape` refuses.
    """
    if not re.fullmatch(r"([^()]*\([^()]*\))*[^()]*", text):
        raise ValueError(
            f"mesh {text!r} has a parenthesis without its other half, or one in another; write "
            "dp=4,tp=4(row=2,column=2)"
        )
    sizes: dict[str, int] = {}
    split: dict[str, dict[str, int]] = {}
    fold: dict[str, tuple[int, tuple[str, ...]]] = {}
    for part in filter(None, map(str.strip, re.split(r",(?![^()]*\))", text))):
        item = re.fullmatch(r"(?P<before>[^()]*)(\((?P<inside>[^()]*)\))?", part)
        if item is None:
            raise ValueError(f"mesh {text!r} goes on after a parenthesis in {part!r}; put a comma there")
        name, size = _name_and_size(text, item["before"])
        inside = None if item["inside"] is None else [each.strip() for each in item["inside"].split(",")]
        is_fold = inside is not None and not any("=" in each for each in inside)
        if name in sizes or name in fold:
            raise ValueError(f"mesh {text!r} gives axis {name} twice; give each axis once")
        _check_item(text, name, inside, is_fold)
        if is_fold or name in FOLDS:
            fold[name] = size, FOLDS[name] if inside is None else tuple(inside)
            continue
        sizes[name] = size
        if inside is not None:
            named = [_name_and_size(text, each) for each in inside]
            split[name] = dict(named)
            if len(split[name]) < len(named):
                raise ValueError(f"mesh {text!r} refines {name} into two axes of one name; name each once")
    # Equal meshes are equal shapes.
    sizes = {name: size for name, size in sizes.items() if size > 1 or name in split}
    fold = {name: given for name, given in fold.items() if given != (1, FOLDS.get(name))}
    return MeshShape(sizes, split, fold)


def _check_item(text: str, name: str, inside: list[str] | None, is_fold: bool) -> None:
    """ValueError where the name of an item and what stands in its parentheses do not belong together."""
    if inside is not None and not all(inside):
        raise ValueError(
            f"mesh {text!r} leaves a place between the parentheses of {name} empty; write tp=4(row=2,column=2) for "
            "what an axis is refined into, ep=2(dp,cp) for what is folded"
        )
    if name in AXIS_NAMES and is_fold:
        raise ValueError(
            f"mesh {text!r} makes {name} of other axes, and {name} has ranks of its own; give the fold another name, "
            f"or the sizes of what {name} is refined into, as in tp=4(row=2,column=2)"
        )
    if name in FOLDS and inside is not None and not is_fold:
        raise ValueError(
            f"mesh {text!r} refines {name}, which is made of other axes; refine one of {', '.join(AXIS_NAMES)}"
        )
    if name not in (*AXIS_NAMES, *FOLDS) and not is_fold:
        raise ValueError(f"mesh {text!r} names an unknown axis {name!r}; {_known(name)}, as in tp=2,pp=2")


def _name_and_size(text: str, item: str) -> tuple[str, int]:
    name, equals, value = (piece.strip() for piece in item.partition("="))
    if not name:
        raise ValueError(f"mesh {text!r} has {item.strip()!r} where a name and its size belong; write tp=2")
    if not equals or not re.fullmatch(r"[0-9]+", value):
        raise ValueError(
            f"mesh {text!r} must give axis {name} a positive whole number, not {value!r}; write {name}=2"
        )
    if len(value.lstrip("0")) > len(str(MOST_RANKS)) or int(value) > MOST_RANKS:
        raise ValueError(f"mesh {text!r} gives axis {name} more than {MOST_RANKS:,} ranks; write {name}=2")
    check_size(name, int(value))
    return name, int(value)


def _known(name: str) -> str:
    known = (*AXIS_NAMES, *FOLDS)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}" if close else f"use some of {', '.join(known)}"


def check_mesh(shape: MeshShape, world_size: int) -> None:
    """Raise ValueError unless the shape is one of so many ranks."""
    num_ranks = shape.grid.num_ranks
    if num_ranks != world_size:
        were = "was" if world_size == 1 else "were"
        raise ValueError(
            f"mesh {shape} needs {num_ranks} rank{'s' * (num_ranks > 1)} but {world_size} "
            f"{were} started; start {num_ranks} (torchrun --nproc-per-node {num_ranks}) or use a mesh whose "
            f"sizes multiply to {world_size}"
        )
