"""What a store's parameters are to the world outside: whole copies, this rank's rows, and values that come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pypar.data_parallel.pieces import gather_pieces_start
from pypar.data_parallel.zero.members import Group, Member, Unit
from pypar.layout import local_part
from pypar.mesh import Mesh
from pypar.sharded import Sharded
from pypar.sharded.checkpointable import Stored


def _kept(member: Member) -> Tensor:
    """This rank's rows in the precision in which they are kept."""
    return member.share if member.master is None else member.master.data


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state_dict has."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _names(models: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for model in models:
        yield from model.named_parameters(remove_duplicate=False)


@torch.no_grad()
def whole(models: Sequence[nn.Module], units: Sequence[Unit]) -> dict[str, Tensor]:
    """Name -> all of it, as state_dict() of the models before they were cut: tied names, buffers."""
    of = {}
    for unit in units:
        for group in unit.groups:
            of.update(_whole_of(group))
    state = {name: of[parameter] for name, parameter in _names(models)}
    for model in models:
        state.update((name, buffer.detach().clone()) for name, buffer in _buffers(model))
    return state


def _whole_of(group: Group) -> dict[nn.Parameter, Tensor]:
    kept = [_kept(member) for member in group.members]
    made = [torch.empty_like(m.whole, dtype=x.dtype) for m, x in zip(group.members, kept, strict=True)]
    pieces = [m.each(x) for m, x in zip(group.members, made, strict=True)]
    parts = [[piece[rank] for piece in pieces] for rank in range(group.axis.size)]
    gather_pieces_start(kept, parts, group.axis).wait()
    return {
        m.parameter: m.parameter._pypar_sharding.whole(x) if isinstance(m.parameter, Sharded) else x
        for m, x in zip(group.members, made, strict=True)
    }


def parts(models: Sequence[nn.Module], units: Sequence[Unit], mesh: Mesh) -> dict[str, Tensor]:
    """Name -> a copy of this rank's rows, which torch.distributed.checkpoint writes and reads into; and buffers."""
    state: dict[str, Tensor] = {
        member.name: Stored.of(_kept(member).clone(), member.layout, mesh)
        for unit in units
        for member in unit.members
    }
    for model in models:
        state.update((name, buffer.detach().clone()) for name, buffer in _buffers(model))
    return state


@torch.no_grad()
def load(models: Sequence[nn.Module], units: Sequence[Unit], state: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Take values in, by name. ValueError, before anything is written, for names and shapes that are others."""
    of = {member.parameter: member for unit in units for member in unit.members}
    members = {name: of[parameter] for name, parameter in _names(models)}
    members.update((member.name, member) for member in of.values())
    buffers = {name: buffer for model in models for name, buffer in _buffers(model)}
    found = {id(members[name]) for name in state if name in members}
    missing = [member.name for member in of.values() if id(member) not in found]
    missing += [name for name in buffers if name not in state]
    unknown = [name for name in state if name not in members and name not in buffers]
    for what, names in (("lacks", missing), ("has an unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the state {what} {names[0]!r}{more}; give what store.state_dict() returns")
    for name, value in state.items():
        expected = members[name].layout.global_shape if name in members else buffers[name].shape
        if tuple(value.size()) != tuple(expected):
            raise ValueError(
                f"{name!r} has the shape {tuple(value.size())} in the state and {tuple(expected)} in the model; load "
                "the state of the same model"
            )
    for name, value in state.items():
        if name in buffers:
            buffers[name].copy_(value)
        else:
            member = members[name]
            _kept(member).copy_(_rows(value, member, mesh))


def _rows(value: Tensor, member: Member, mesh: Mesh) -> Tensor:
    if isinstance(value, Stored):
        part = value._part()
        if part.shape != _kept(member).shape:
            raise ValueError(
                f"{member.name!r} is {tuple(part.shape)} of this rank in the state and {tuple(_kept(member).shape)} in "
                "the store; read parts of another layout with torch.distributed.checkpoint"
            )
        return part
    return local_part(value.detach().to(_kept(member).device), member.layout, mesh)


@torch.no_grad()
def take_over(units: Sequence[Unit]) -> None:
    """Let masters and shares be what has been written into whole parameters; what was not written stays as precise."""
    for unit in units:
        for member in unit.members:
            now, share, master = member.parts[member.rank], member.share, member.master
            if master is not None and master.dtype != share.dtype:
                changed = now != master.to(share.dtype)
                master.copy_(torch.where(changed, now.to(master.dtype), master))
            if share is not now:
                share.copy_(now)
