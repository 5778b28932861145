"""How rows of parameters are cut over ranks: parts along dim 0, whose sizes are those of torch.tensor_split."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pypar.layout import Cut, Layout, Owner
from pypar.mesh import Axis
from pypar.spans import Span, part


def rows_of(local: Tensor, num_ranks: int) -> list[Span]:
    """(begin, end) of each rank's rows of what a rank holds; a tensor without dims is one row, of rank 0."""
    num_rows = local.shape[0] if local.dim() else 1
    return [part(num_rows, rank, num_ranks) for rank in range(num_ranks)]


def piece(x: Tensor, rows: Span) -> Tensor:
    """The rows of x, a view; all of a tensor without dims is itself, and nothing of it has the shape (0,)."""
    begin, end = rows
    if x.dim():
        return x[begin:end]
    return x if end > begin else x.view(1)[:0]


def cut_further(layout: Layout, axis: Axis) -> Layout:
    """The layout of a parameter whose rows are also cut over an axis."""
    if axis.size == 1:
        return layout
    if not layout.global_shape:
        return replace(layout, owner=Owner(axis.names, 0))
    return replace(layout, cuts=(*layout.cuts, Cut(0, axis.names)))
