"""Makes the units of a store: whose parameters they are, over which ranks they are cut, what travels together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pypar.blocks import Block, global_parameters
from pypar.data_parallel.zero.arguments import check_alike
from pypar.data_parallel.zero.members import Group, Member, Unit, make_member
from pypar.data_parallel.zero.units import blocks_for, split_by_block
from pypar.grid import SAMPLES, TIED
from pypar.layout import layout_of
from pypar.mesh import Mesh
from pypar.owned import Owned
from pypar.sharded.partial import leave_to_layout

# Refinements of the axis of samples: rows are cut over BETWEEN x WITHIN, and over WITHIN alone between a block's
# forward and its backward.
REPLICATE, BETWEEN, WITHIN = "replicate", "between", "within"


@dataclass(frozen=True)
class Made:
    """units: in the order of a forward, each model's root first. roots, blocks: of each model. names: all in order."""

    units: list[Unit]
    roots: list[Block]
    blocks: list[list[Block]]
    names: list[str]
    mesh: Mesh


@dataclass(frozen=True)
class Build:
    """What decides how a parameter is kept."""

    stage: int
    shard_size: int
    reshard: bool | int
    dtype: torch.dtype | None
    bucket_bytes: int
    keeps_rows: bool = (
        False  # at every stage this rank's rows have memory of their own, which others do not read
    )

    def refinement(self, num_samples: int) -> dict[str, int]:
        """The axis of samples as a product, outermost first; {} where all of it is one."""
        shard = self.shard_size or num_samples
        within = 1 if self.reshard is False else shard if self.reshard is True else self.reshard
        parts = {REPLICATE: num_samples // shard, BETWEEN: shard // within, WITHIN: within}
        return parts if self.stage and (shard < num_samples or 1 < within < shard) else {}


def make_units(
    models: Sequence[nn.Module],
    mesh: Mesh,
    build: Build,
    blocks: Sequence[Block | str] | None = None,
) -> Made:
    """The units of all models. Every rank calls it; ValueError, before anything is changed, for ranks that differ."""
    named = {p: name for model in models for name, p in global_parameters(model)}
    found = [blocks_for(model, blocks) for model in models]
    roots = [Block(f"the root of stage {index}" if index else "the root", ()) for index in range(len(models))]
    for parameter in named:
        leave_to_layout(parameter)
    summed = {p: mesh.grid.in_order(layout_of(p).sum_over) for p in named}
    mesh.declare(*summed.values(), *(_without_tied(axes) for axes in summed.values()))
    for axes in sorted(set(summed.values()), key=lambda axes: (len(axes), axes)):
        alike = [(named[p], p) for p in named if summed[p] == axes]
        check_alike(
            alike, mesh.axis(*_without_tied(axes)), f"{build}, blocks {[b.name for b in sum(found, [])]}"
        )
    if parts := build.refinement(mesh.axis(SAMPLES).size):
        mesh = mesh.refined(SAMPLES, parts)
    spreads = {axes: _spread(axes, mesh, build) for axes in summed.values()}
    mesh.declare(*(product for spread in spreads.values() for product in spread))
    units: list[Unit] = []
    for model, own_blocks, root in zip(models, found, roots, strict=True):
        own, of_root, sharing = split_by_block(model, own_blocks)
        first = Unit(root, _groups(of_root, named, mesh, build))
        units.append(first)
        for block in own_blocks:
            unit = Unit(block, _groups(own[block], named, mesh, build))
            unit.root = first if block in sharing else None
            units.append(unit)
    if build.stage == 3 and not build.keeps_rows:
        for unit in units:
            for group in unit.groups:
                group.lay_out()
    return Made(units, roots, found, list(named.values()), mesh)


def owned_by(made: Made) -> list[Owned]:
    """This rank's rows of what is trained, in the order of the models' parameters."""
    owned = [
        Owned(m.name, m.master, m.gradient, m.layout)
        for unit in made.units
        for group in unit.trained
        for m in group.members
        if m.master is not None and m.gradient is not None
    ]
    order = {name: index for index, name in enumerate(made.names)}
    return sorted(owned, key=lambda each: order[each.name])


def _without_tied(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Over these each rank has the same rows of a parameter, and they are cut; two stages keep a tied one each."""
    return tuple(name for name in axes if name != TIED)


def _spread(axes: tuple[str, ...], mesh: Mesh, build: Build) -> tuple[tuple[str, ...], ...]:
    """Of a parameter whose gradient is summed over these axes, those over which rows are cut, over which the cut rows'
    gradients are summed as well, and over which rows stay cut between forward and backward.
    """
    if build.stage == 0:
        return (), axes, ()
    tied = tuple(name for name in axes if name == TIED)
    cut = _without_tied(axes)
    if SAMPLES not in axes or SAMPLES not in mesh.grid.split:
        within = cut if build.reshard is not False else ()
        return cut, tied, within
    others = tuple(name for name in cut if name != SAMPLES)
    outer = mesh.grid.in_order((*tied, REPLICATE))
    return mesh.grid.in_order((BETWEEN, WITHIN, *others)), outer, mesh.grid.in_order((WITHIN, *others))


def _groups(
    parameters: Sequence[nn.Parameter], named: dict[nn.Parameter, str], mesh: Mesh, build: Build
) -> list[Group]:
    """The groups of a unit; one closes once it has its bytes."""
    nobody = mesh.axis()
    closed: list[Group] = []
    is_open: dict[object, Group] = {}
    for parameter in parameters:
        axes, is_trained = mesh.grid.in_order(layout_of(parameter).sum_over), parameter.requires_grad
        axis, outer, inner = (mesh.axis(*product) for product in _spread(axes, mesh, build))
        if build.stage < 3 and not is_trained:
            axis, outer = nobody, nobody
        is_apart = build.stage == 3 or (build.keeps_rows and is_trained)
        member = make_member(named[parameter], parameter, axis, build.dtype, cuts_parameters=is_apart)
        key = (axis.ranks, outer.ranks, member.whole.dtype, member.whole.device, is_trained, _kept(member))
        group = is_open.setdefault(key, Group([], axis, outer, inner, is_trained))
        group.members.append(member)
        if sum(m.whole.nbytes for m in group.members) >= build.bucket_bytes:
            closed.append(is_open.pop(key))
    return closed + list(is_open.values())


def _kept(member: Member) -> torch.dtype | None:
    return None if member.master is None else member.master.dtype
