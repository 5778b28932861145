"""Names for the axes of parallelism, and the process group behind each.

Ranks are laid out with pp outermost, then dp, cp, and tp innermost, so that the ranks of one tensor-parallel
group are neighbours (one node) and the stages of a pipeline are far apart. `pypar.grid` is the arithmetic of it, which
needs no ranks; a Mesh adds the process groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pypar.axis import Axis, as_axis
from pypar.comm.traffic import Traffic
from pypar.grid import DATA, TIED, Grid
from pypar.mesh_shape import AXIS_NAMES, Fold, MeshShape, Split, check_mesh, mesh_shape, parse_mesh

__all__ = ["AXIS_NAMES", "Axis", "Mesh", "MeshShape", "as_axis", "parse_mesh"]


class Mesh:
    """All ranks of the job as a grid of pp x dp x cp x tp.

    Every rank makes the same meshes in the same order, after init_process_group (a mesh of one rank needs
    none).

        mesh = Mesh(dp=4, tp=4, split={"tp": {"row": 2, "column": 2}}, fold={"ep": (2, ("dp", "cp"))})
        mesh.tp, mesh.row, mesh.ep, mesh.edp, mesh.data        each an Axis: group, rank, size, ranks
        mesh.axis("dp", "cp")                                  a product of axes as one Axis

    pp, dp, cp, tp  the axes
    split           refinements of axes: {axis: {name: size, ..}}, outermost first
    fold            other views of the same ranks: {name: (size, axes)}; neighbours on the product of the axes are
                    together, and what is left is an axis too ("ep" leaves "edp"). ep=2 stands for
                    fold={"ep": (2, ("dp", "cp"))}
    products        products of axes that are used as one, see `declare`
    data            dp and cp as one axis: gradients are summed over it
    world           all ranks as one axis
    tied            the first and the last stage of pp, which both hold a tied embedding; this rank alone in between
    sizes           {"pp": .., "dp": .., "cp": .., "tp": ..}
    grid, rank      the arithmetic (`pypar.grid`) and this rank in it
    device_mesh     the same grid as a torch DeviceMesh, None where the mesh has one rank

    device_type is "cpu" or "cuda"; by default what the default process group's backend serves.
    """

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    ep: Axis
    edp: Axis
    tied: Axis

    def __init__(  # noqa: PLR0913 - the axes are arguments
        self,
        dp: int = 1,
        pp: int = 1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        *,
        split: Split | None = None,
        fold: Fold | None = None,
        products: Iterable[tuple[str, ...]] = (),
        device_type: str | None = None,
    ) -> None:
        shape = mesh_shape({"dp": dp, "pp": pp, "cp": cp, "tp": tp, "ep": ep}, split, fold)
        self.shape = shape
        self.grid = shape.grid
        self.sizes = dict(self.grid.sizes)
        if dist.is_available() and dist.is_initialized():
            check_mesh(shape, dist.get_world_size())
        elif self.grid.num_ranks > 1:
            raise ValueError(
                f"mesh {shape} needs {self.grid.num_ranks} ranks but torch.distributed is not "
                "initialised; call torch.distributed.init_process_group first, under torchrun"
            )
        self.rank = dist.get_rank() if self.grid.num_ranks > 1 else 0
        self._axes: dict[tuple[str, ...], Axis] = {(): Axis.single("none")}  # by product
        self._groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        self.device_mesh: DeviceMesh | None = None
        if self.grid.num_ranks > 1:
            self._take_groups(device_type or _device_type())
        for name in self.grid.names:
            setattr(self, name, self._make((name,), name))
        self.data = self._make(DATA, "data")
        self.world = self._make(AXIS_NAMES, "world")
        if products := tuple(products):
            self.declare(*products)

    @classmethod
    def of(cls, shape: MeshShape, *, device_type: str | None = None) -> Mesh:
        """The mesh that a text like "dp=4,tp=4(row=2,column=2)" describes: Mesh.of(parse_mesh(text))."""
        sizes: Any = shape.sizes
        return cls(**sizes, split=shape.split, fold=shape.fold, device_type=device_type)

    def refined(self, axis: str, parts: Mapping[str, int]) -> Mesh:
        """This mesh with one more refinement of an axis, as `split` makes it: another mesh over the same groups.

        Every rank of the mesh calls it. ValueError for an axis that is refined already.
        """
        if axis in self.grid.split:
            raise ValueError(
                f"axis {axis!r} of mesh {self.shape} is refined already, and is to be refined into "
                f"{' x '.join(parts)} for this; make the mesh without its split"
            )
        made = copy.copy(self)
        sizes: Any = self.shape.sizes
        made.shape = mesh_shape(sizes, {**self.shape.split, axis: dict(parts)}, self.shape.fold)
        made.grid, made._axes = made.shape.grid, dict(self._axes)
        for name in parts:
            setattr(made, name, made._make((name,), name))
        return made

    def _take_groups(self, device_type: str) -> None:
        """The groups of the four axes and of all ranks, which torch makes."""
        shape = tuple(self.sizes.values())
        self.device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXIS_NAMES)
        self._groups[self.grid.groups(*AXIS_NAMES)] = dist.group.WORLD
        for name, size in self.sizes.items():
            if size > 1:
                self._groups.setdefault(self.grid.groups(name), self.device_mesh.get_group(name))

    def _make(self, axes: tuple[str, ...], name: str) -> Axis:
        """The axis over a product of axes, whose groups are made where none of the mesh has the same ranks."""
        groups = self.grid.groups(*axes)
        ranks = next(group for group in groups if self.rank in group)
        # On "tied" the stages in between are alone.
        sizes = {each: self.grid.size(each) for each in axes}
        if TIED in sizes and len(ranks) < math.prod(sizes.values()):
            sizes[TIED] = 1
        if groups not in self._groups and any(len(group) > 1 for group in groups):
            made = {group: dist.new_group(list(group)) for group in groups if len(group) > 1}
            self._groups[groups] = made.get(ranks)
        group = self._groups.get(groups)
        grid = self.grid if axes == AXIS_NAMES else Grid(sizes)
        axis = Axis(name, group, ranks.index(self.rank), len(ranks), ranks, Traffic(name), grid)
        self._axes[axes] = axis
        return axis

    def declare(self, *products: tuple[str, ...]) -> None:
        """Make the groups of products of axes, for `axis`. Every rank of the mesh calls it, with what it needs itself.

        The ranks tell each other what they need, so that all make all groups in one order.
        """
        wanted = sorted({self.grid.in_order(product) for product in products})
        if self.world.size > 1:
            of_ranks: list[list[tuple[str, ...]]] = [[] for _ in self.world.ranks]
            dist.all_gather_object(of_ranks, wanted, group=self.world.group)
            wanted = sorted({product for of_rank in of_ranks for product in of_rank})
        for product in wanted:
            if self._found(product) is None:
                self._make(product, " x ".join(product))

    def axis(self, *axes: str) -> Axis:
        """A product of axes as one Axis, the same object each time; axes of size 1 change nothing.

        Its ranks are in the order of the mesh's axes, in whatever order the names are given. ValueError for axes that
        are unknown or not independent, and for a product that was not declared.
        """
        product = self.grid.in_order(axes)
        found = self._found(product)
        if found is None:
            raise ValueError(
                f"the product of the axes {', '.join(product)} was not declared, so it has no process group; declare "
                f"it when the mesh is made, Mesh(..., products=[{product!r}]), or with mesh.declare({product!r}) on "
                "every rank"
            )
        return found

    def _found(self, product: tuple[str, ...]) -> Axis | None:
        """The axis of this product, or of the most of its axes, where those left out have size 1."""

        def cut(axes: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in axes if self.grid.size(name) > 1)

        same = [made for made in self._axes if set(made) <= set(product) and cut(made) == cut(product)]
        return self._axes[max(same, key=len)] if same else None

    def __getattr__(self, name: str) -> NoReturn:
        grid = self.__dict__.get("grid")
        names = f"; it has {', '.join(grid.names)}, data and world" if grid is not None else ""
        raise AttributeError(f"this mesh has no axis {name!r}{names}")

    def __repr__(self) -> str:
        return f"Mesh({self.shape})"


def _device_type() -> str:
    """The device type that the default process group serves: "cuda" with NCCL and a GPU, else "cpu"."""
    return "cuda" if "nccl" in dist.get_backend_config() and torch.cuda.is_available() else "cpu"
