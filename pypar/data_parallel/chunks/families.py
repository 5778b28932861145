"""Parameters that share chunks: rows of parameters and of gradients, and what an optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pypar.arenas import Arena, Copies
from pypar.data_parallel.chunks.chunk import Chunk, views
from pypar.data_parallel.chunks.packing import Packing, search
from pypar.data_parallel.zero.members import Member, Unit


class Chunked:
    """Members whose rows lie in one chunk, and gradients in another one of the same elements.

    index     of the chunk of rows among all chunks; that of gradients is the next one
    """

    def __init__(
        self, index: int, members: Sequence[Member], numel: int, device: Arena, host: Arena, copies: Copies
    ):
        self.index, self.members = index, list(members)
        self._device, self._host = device, host
        self.is_resident = False
        self._counted = 0  # bytes of masters and states on the host
        name = f"the chunk of {members[0].name}"
        self.rows = Chunk(f"{name}, rows", numel, members[0].share.dtype, device, host, copies)
        for place, member in zip(views(self.rows.home, self._shares()), members, strict=True):
            place.copy_(member.share)
        self.sums: Chunk | None = None
        gradients = self._gradients()
        if gradients:
            self.sums = Chunk(f"{name}, gradients", numel, gradients[0].dtype, device, host, copies)
        self.bind()

    def _shares(self) -> list[Tensor]:
        return [member.share for member in self.members]

    def _gradients(self) -> list[Tensor]:
        return [member.gradient for member in self.members if member.gradient is not None]

    @property
    def chunks(self) -> list[Chunk]:
        return [self.rows] if self.sums is None else [self.rows, self.sums]

    def bind(self) -> None:
        """Let members' tensors be what lies at home now. They stay the same objects."""
        for place, member in zip(views(self.rows.home, self._shares()), self.members, strict=True):
            if member.master is not None and member.master.dtype == place.dtype:
                member.master.data = place
            member.share.data = place
        if self.sums is not None:
            for place, gradient in zip(
                views(self.sums.home, self._gradients()), self._gradients(), strict=True
            ):
                gradient.data = place

    def apart(self, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[Member, Tensor]]:
        """Masters of more bits than rows, and the optimizer's states: what only the update reads and writes."""
        for member in self.members:
            master = member.master
            if master is None:
                continue
            if master.dtype != member.share.dtype:
                yield member, master
            if optimizer is not None:
                for value in optimizer.state.get(master, {}).values():
                    if isinstance(value, Tensor) and value.dim() and value.shape == master.shape:
                        yield member, value

    def room_apart(self, optimizer: torch.optim.Optimizer | None) -> int:
        """Bytes of `apart` on the rank that has the most rows: what a device has room for, the same on all ranks."""
        return sum(largest(member) * x.element_size() for member, x in self.apart(optimizer))

    def count(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Let the host's account have `apart`, where it lies there."""
        if not self.is_resident:
            num_bytes = sum(x.nbytes for _, x in self.apart(optimizer))
            self._host.count(num_bytes - self._counted)
            self._counted = num_bytes

    def settle_down(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Lie on the device for good."""
        self._device.count(self.room_apart(optimizer))
        for chunk in self.chunks:
            chunk.settle_down()
        self._carry(self._device, optimizer)
        self._host.count(-self._counted)
        self.is_resident, self._counted = True, 0
        self.bind()

    def move_out(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Lie on the host again."""
        for chunk in self.chunks:
            chunk.move_out()
        self._carry(self._host, optimizer)
        self._device.count(-self.room_apart(optimizer))
        self.is_resident = False
        self.count(optimizer)
        self.bind()

    def _carry(self, to: Arena, optimizer: torch.optim.Optimizer | None) -> None:
        for _, x in self.apart(optimizer):
            value = torch.empty(x.shape, dtype=x.dtype, device=to.device, pin_memory=to.pinned)
            value.copy_(x)
            x.data = value


def in_families(
    units: Sequence[Unit], device: Arena, host: Arena, copies: Copies, *, most_bytes: int, is_cut: bool
) -> tuple[list[Chunked], dict[Member, Chunked], dict[tuple[torch.dtype, bool], Packing]]:
    """The families of all units, in the order of their use; whose each member is; how each kind is packed.

    most_bytes  of a chunk of rows
    is_cut      parameters that are not trained are cut over ranks too, and move
    """
    kinds: dict[tuple[torch.dtype, torch.dtype | None], list[Member]] = {}
    for unit in units:
        for member in unit.members:
            if member.master is not None or is_cut:
                kept = None if member.master is None else member.master.dtype
                kinds.setdefault((member.share.dtype, kept), []).append(member)
    families: list[Chunked] = []
    of: dict[Member, Chunked] = {}
    packings = {}
    index = 0
    for (dtype, kept), members in kinds.items():
        # Of the first rank, which has the most rows: chunks are the same on all ranks, and so are refusals.
        sizes = [largest(member) * dtype.itemsize for member in members]
        packing = packings[dtype, kept is not None] = search(sizes, max(most_bytes, 1))
        for number, indexes in enumerate(packing.chunks):
            inside = [members[i] for i in indexes]
            shared = packing.chunk_bytes // dtype.itemsize
            numel = largest(inside[0]) if number in packing.alone else shared
            family = Chunked(index, inside, numel, device, host, copies)
            families.append(family)
            of.update(dict.fromkeys(inside, family))
            index += 2
    return families, of, packings


def largest(member: Member) -> int:
    """Elements of the rank that has the most rows."""
    return max(x.numel() for x in member.parts)
