"""The gradients of a model of which different parameters are summed over different axes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from pypar.data_parallel.buckets import GradientBuckets
from pypar.layout import layout_of
from pypar.mesh import Axis, Mesh
from pypar.sharded.partial import leave_to_layout


class Gradients:
    """`GradientBuckets` for each set of axes that layouts of the parameters are summed over; used as one of them.

    Every rank of the mesh makes it: it declares the products of axes that it needs. ``options`` are those of
    `GradientBuckets`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], mesh: Mesh, **options: Any) -> None:
        by_axes: dict[tuple[str, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            leave_to_layout(parameter)
            by_axes.setdefault(mesh.grid.in_order(layout_of(parameter).sum_over), []).append(parameter)
        mesh.declare(*by_axes)
        # Sets of axes that are the same ranks on this mesh share their buckets. All ranks make theirs in one order.
        groups: dict[tuple[int, ...], tuple[Axis, list[nn.Parameter]]] = {}
        for axes in sorted(by_axes, key=lambda axes: (len(axes), axes)):
            axis = mesh.axis(*axes)
            groups.setdefault(axis.ranks, (axis, []))[1].extend(by_axes[axes])
        self.buckets = [GradientBuckets(members, axis, **options) for axis, members in groups.values()]
        self._of = {
            p: buckets
            for buckets, (_, members) in zip(self.buckets, groups.values(), strict=True)
            for p in members
        }

    @property
    def axes(self) -> list[Axis]:
        return [buckets.axis for buckets in self.buckets]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return self._of[parameter].gradient(parameter)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for buckets in self.buckets:
                stack.enter_context(buckets.accumulate())
            yield

    def finish(self) -> None:
        """All reductions are started before one is waited for: ranks have them in different orders."""
        for buckets in self.buckets:
            buckets.start_rest()
        for buckets in self.buckets:
            buckets.finish()

    def zero(self) -> None:
        for buckets in self.buckets:
            buckets.zero()

    def scale(self, factor: float) -> None:
        for buckets in self.buckets:
            buckets.scale(factor)
