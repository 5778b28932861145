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
from pypar.grid import TIED
from pypar.layout import layout_of
from pypar.mesh import Axis, Mesh
from pypar.sharded.partial import leave_to_layout


@dataclass(frozen=True)
class Made:
    """units: in the order of a forward, each model's root first. roots, blocks: of each model. names: all in order."""

    units: list[Unit]
    roots: list[Block]
    blocks: list[list[Block]]
    names: list[str]


@dataclass(frozen=True)
class Build:
    """What decides how a parameter is kept."""

    stage: int
    dtype: torch.dtype | None
    bucket_bytes: int


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
        check_alike(alike, mesh.axis(*_without_tied(axes)), str(build))
    units: list[Unit] = []
    for model, own_blocks, root in zip(models, found, roots, strict=True):
        own, of_root, sharing = split_by_block(model, own_blocks)
        first = Unit(root, _groups(of_root, named, mesh, build))
        units.append(first)
        for block in own_blocks:
            unit = Unit(block, _groups(own[block], named, mesh, build))
            unit.root = first if block in sharing else None
            units.append(unit)
    return Made(units, roots, found, list(named.values()))


def _without_tied(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Over these each rank has the same rows of a parameter, and they are cut; two stages keep a tied one each."""
    return tuple(name for name in axes if name != TIED)


def _groups(
    parameters: Sequence[nn.Parameter], named: dict[nn.Parameter, str], mesh: Mesh, build: Build
) -> list[Group]:
    """The groups of a unit; one closes once it has its bytes."""
    nobody = Axis.single("nobody")
    closed: list[Group] = []
    is_open: dict[object, Group] = {}
    for parameter in parameters:
        axes = mesh.grid.in_order(layout_of(parameter).sum_over)
        cut_over, is_trained = mesh.axis(*_without_tied(axes)), parameter.requires_grad
        tied = mesh.axis(TIED) if TIED in axes else nobody
        if build.stage == 0 or (build.stage < 3 and not is_trained):
            axis, outer = nobody, mesh.axis(*axes) if is_trained else nobody
        else:
            axis, outer = cut_over, tied
        member = make_member(named[parameter], parameter, axis, build.dtype, cuts_parameters=build.stage == 3)
        key = (axis.ranks, outer.ranks, member.whole.dtype, member.whole.device, is_trained, _kept(member))
        group = is_open.setdefault(key, Group([], axis, outer, is_trained))
        group.members.append(member)
        if sum(m.whole.nbytes for m in group.members) >= build.bucket_bytes:
            closed.append(is_open.pop(key))
    return closed + list(is_open.values())


def _kept(member: Member) -> torch.dtype | None:
    return None if member.master is None else member.master.dtype
