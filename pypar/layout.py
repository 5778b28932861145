"""Which part of a global tensor a rank holds, and who counts it.

    Layout((F, D), [Cut(0, ("tp",))])                                  rows over tp
    Layout((F, D), [Cut(0, ("tp",)), Cut(0, ("dp",))])                 each tp rank's rows once more over dp (ZeRO)
    Layout((q + k + v, D), [Cut(0, ("tp",), blocks=(q, k, v))])        three fused matrices, each over tp
    Layout((F, D), [Cut(0, ("row",)), Cut(1, ("column",))])            a 2D grid
    Layout((E, F, D), [Cut(0, ("ep",))], sum_over=("edp",))            experts
    Layout((F, D), owner=Owner(("dp", "cp"), 3))                       whole, on one rank of dp x cp

Two primitives say all about a layout, for any rank of any grid: `boxes`, which slices of the whole it holds, and
`answers_for`, whether it is the one that counts them. The rest follows from these. A parameter carries its `Layout`:
one that is cut is a `pypar.sharded.Sharded`, whose plain part (`local_tensor`) is what layers compute with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pypar.grid import DATA, TIED, Grid
from pypar.spans import Span, joined, part, within

_ATTRIBUTE = "_pypar_layout"


class GridRank(Protocol):
    """A rank in a grid: a `Mesh`, an `Axis`, or a `pypar.grid.SimulatedRank`."""

    @property
    def grid(self) -> Grid: ...

    @property
    def rank(self) -> int: ...


@dataclass(frozen=True)
class Cut:
    """Dim ``dim`` is cut over a product of mesh axes, outermost first, into parts in the order of their ranks.

    Parts are as equal as possible, larger ones first (torch.tensor_split). ``blocks`` are the lengths of parts that are
    fused along the dim: each is cut by itself, and a rank holds its parts behind each other.
    """

    dim: int
    axes: tuple[str, ...]
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _names(self.axes))
        object.__setattr__(self, "blocks", tuple(self.blocks))


@dataclass(frozen=True)
class Owner:
    """Only rank ``rank`` of a product of mesh axes holds the tensor."""

    axes: tuple[str, ...]
    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _names(self.axes))


@dataclass(frozen=True)
class Layout:
    """Where the parts of a global tensor are.

    global_shape  shape of the whole tensor
    cuts          how it is cut, one after another: where two cut one dim, the second one cuts the part that the first
                  one leaves; on axes that are not named every rank that has the tensor has the same part
    sum_over      all axes over which each rank's gradient is only a part, to be summed before the optimizer uses it:
                  ("dp", "cp"); and "tp" for norms under sequence parallelism, "tied" for a tied embedding, ("edp",)
                  for experts
    owner         the rank that has all of what the cuts leave, where the others have nothing
    """

    global_shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    sum_over: tuple[str, ...] = DATA
    owner: Owner | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_shape", tuple(self.global_shape))
        object.__setattr__(self, "cuts", tuple(self.cuts))
        object.__setattr__(self, "sum_over", _names(self.sum_over))
        seen: set[int] = set()
        for cut in self.cuts:
            if not 0 <= cut.dim < len(self.global_shape):
                raise ValueError(
                    f"layout cuts dim {cut.dim} over {' x '.join(cut.axes)}, but the tensor's shape is "
                    f"{self.global_shape}; use a dim from 0 to {len(self.global_shape) - 1}"
                )
            if cut.blocks and (cut.dim in seen or sum(cut.blocks) != self.global_shape[cut.dim]):
                raise ValueError(
                    f"blocks {cut.blocks} of dim {cut.dim} must add up to its length {self.global_shape[cut.dim]} and "
                    "stand in the first cut of the dim"
                )
            seen.add(cut.dim)
        axes = self.axes
        if len(set(axes)) < len(axes) or len(set(self.sum_over)) < len(self.sum_over):
            raise ValueError(
                f"{self} must name each mesh axis at most once in cuts and owner, and in sum_over"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes on which ranks have different parts."""
        of_cuts = [name for cut in self.cuts for name in cut.axes]
        return (*of_cuts, *(self.owner.axes if self.owner else ()))

    def __str__(self) -> str:
        cuts = [
            f"dim {cut.dim} over {' x '.join(cut.axes)}" + f" in blocks {cut.blocks}" * bool(cut.blocks)
            for cut in self.cuts
        ]
        owned = [f"owned by rank {self.owner.rank} of {' x '.join(self.owner.axes)}"] if self.owner else []
        return f"layout of {self.global_shape} ({', '.join(cuts + owned) or 'whole on every rank'})"


@dataclass(frozen=True)
class Box:
    """A rectangular slice of a global tensor, and where it lies in a rank's part."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    local_offsets: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes the box in the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offsets, self.lengths, strict=True))

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """What indexes the box in the rank's part."""
        return tuple(
            slice(start, start + n) for start, n in zip(self.local_offsets, self.lengths, strict=True)
        )


def boxes(layout: Layout, grid: Grid, rank: int) -> tuple[Box, ...]:
    """The slices of the whole tensor that a rank holds, none of them empty. ValueError for axes that the grid lacks."""
    if not _owns(layout, grid, rank):
        return ()
    by_dim = []
    for spans in _spans(layout, grid, rank):
        lengths = [end - start for start, end in spans]
        local = itertools.accumulate(lengths, initial=0)
        by_dim.append([(span[0], n, at) for span, n, at in zip(spans, lengths, local, strict=False) if n])
    return tuple(
        Box(tuple(p[0] for p in along), tuple(p[1] for p in along), tuple(p[2] for p in along))
        for along in itertools.product(*by_dim)
    )


def answers_for(layout: Layout, grid: Grid, rank: int) -> bool:
    """Whether a rank counts the elements that it holds: over all ranks that have the tensor, each is counted once.

    It is the first of those with the same boxes. A stage of a pipeline has parameters of its own; where a parameter is
    tied to another stage's (`sum_over`), the first of the two stages answers.
    """
    grid.check_product(layout.axes)
    if not _owns(layout, grid, rank):
        return False
    shared = [name for name in layout.sum_over if name in (TIED, grid.stages) and name in grid.names]
    copies = [name for name in grid.others(*layout.axes) if name != grid.stages]
    return all(grid.coordinate(rank, name) == 0 for name in (*copies, *shared))


def local_shape(layout: Layout, holder: GridRank) -> tuple[int, ...]:
    """The shape of a rank's part; where another one owns the tensor, of length 0 along dim 0."""
    shape = [sum(end - start for start, end in spans) for spans in _spans(layout, holder.grid, holder.rank)]
    return tuple(shape) if _owns(layout, holder.grid, holder.rank) else (0, *shape[1:])


def local_slice(global_tensor: Tensor, layout: Layout, holder: GridRank) -> Tensor:
    """A rank's part of a whole tensor, or of one that is broadcast to it: a view where the part lies in one piece."""
    held = global_tensor
    for dim, spans in enumerate(_spans(layout, holder.grid, holder.rank), start=-len(layout.global_shape)):
        length = layout.global_shape[dim]
        if -dim <= held.dim() and held.shape[dim] == length and spans != [(0, length)]:
            pieces = [held.narrow(dim, start, end - start) for start, end in spans]
            held = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    if _owns(layout, holder.grid, holder.rank) or global_tensor.dim() < len(layout.global_shape):
        return held
    return held.new_empty((0, *held.shape[1:]))


def local_part(global_tensor: Tensor, layout: Layout, holder: GridRank) -> Tensor:
    """A rank's part of a whole tensor: a contiguous copy, or the tensor itself where nothing is cut."""
    if tuple(global_tensor.shape) != layout.global_shape:
        raise ValueError(
            f"a tensor of shape {tuple(global_tensor.shape)} does not have the layout's global shape "
            f"{layout.global_shape}; pass the whole tensor"
        )
    held = local_slice(global_tensor, layout, holder)
    # A copy, so that the part does not keep the whole tensor alive.
    return held if held is global_tensor else held.clone(memory_format=torch.contiguous_format)


def assemble(parts: Sequence[Tensor], layout: Layout, grid: Grid) -> Tensor:
    """The whole tensor from the parts of all ranks of the grid, in their order."""
    whole = parts[0].new_empty(layout.global_shape)
    for rank, held in enumerate(parts):
        for box in boxes(layout, grid, rank):
            whole[box.slices] = held[box.local_slices]
    return whole


def set_layout(param: Tensor, layout: Layout) -> None:
    """Attach a layout to a parameter (its local part).

    The attribute lives on the tensor object: a module's `.to(dtype)` keeps it, but what makes a new Parameter
    (copy.deepcopy, `to_empty` of a meta module) loses it, and the layout must be set again.
    """
    cut_dims = {cut.dim for cut in layout.cuts}
    shape = tuple(local_tensor(param).shape)
    fits = len(shape) == len(layout.global_shape) and all(
        length <= whole if dim in cut_dims else length == whole
        for dim, (length, whole) in enumerate(zip(shape, layout.global_shape, strict=True))
    )
    if not fits and not (layout.owner and 0 in shape):
        raise ValueError(
            f"a parameter of shape {shape} does not fit a {layout}; the dims that are not cut must be equal, and "
            "a part is no longer than the whole"
        )
    setattr(param, _ATTRIBUTE, layout)


def layout_of(param: Tensor) -> Layout:
    """The layout that `set_layout` attached, or a replicated one of the tensor's own shape."""
    layout: Layout | None = getattr(param, _ATTRIBUTE, None)
    return Layout(tuple(param.shape)) if layout is None else layout


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of ``x`` as a plain tensor: the part of a `pypar.sharded.Sharded`, else the tensor itself.

    It shares memory with ``x``, and autograd leads back to it.
    """
    if type(x) in (Tensor, torch.nn.Parameter):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _owns(layout: Layout, grid: Grid, rank: int) -> bool:
    owner = layout.owner
    if owner is None:
        return True
    if not 0 <= owner.rank < grid.size(*owner.axes):
        raise ValueError(
            f"{layout} names rank {owner.rank} of an axis that has {grid.size(*owner.axes)} ranks; count from 0"
        )
    return grid.coordinate(rank, *owner.axes) == owner.rank


def _spans(layout: Layout, grid: Grid, rank: int) -> list[list[Span]]:
    """For each dim the ranges that a rank holds, in the order of its part."""
    grid.check_product(layout.axes)
    spans = [[(0, length)] for length in layout.global_shape]
    for cut in layout.cuts:
        index, count = grid.coordinate(rank, *cut.axes), grid.size(*cut.axes)
        held = spans[cut.dim]
        lengths = cut.blocks or (sum(end - start for start, end in held),)
        starts = itertools.accumulate(lengths, initial=0)
        pieces = [
            piece
            for start, length in zip(starts, lengths, strict=False)
            for piece in within(held, *(start + edge for edge in part(length, index, count)))
        ]
        spans[cut.dim] = joined(pieces)
    return spans


def _names(axes: str | Iterable[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)
