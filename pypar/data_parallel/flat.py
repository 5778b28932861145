"""Where each gradient lies: parameters cut into flat buffers of one dtype and device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from pypar.comm import shared_empty
from pypar.layout import local_tensor
from pypar.mesh import Axis
from pypar.ops.bucket import move
from pypar.sharded import Sharded, wrap

# Each rank's part of a bucket starts on a cache line, and parts are equal.
PART_BYTES = 64


class Started(Protocol):
    """A communication under way; `pypar.comm.Handle` is one."""

    def wait(self) -> object:
        """Returns when the result is in the bucket."""


@dataclass(eq=False)
class Slot:
    """One parameter and where its gradient lies.

    `gradient` has the shape of what this rank holds of the parameter and stays one and the same tensor: when buckets
    are filled anew it is pointed at another memory, so whoever holds it (an optimizer) sees the new place. `shown` is
    what parameter.grad is: the gradient itself, or for a `Sharded` parameter one of the same memory.
    """

    parameter: nn.Parameter
    name: str
    gradient: Tensor
    bucket: Bucket = field(init=False)
    offset: int = 0  # of its first element in the bucket
    is_ready: bool = False  # its last backward of this step is done
    is_frozen: bool = False  # its parameter takes no gradient in this step
    is_stale: bool = False  # holds the sum of an earlier step, not cleared since
    version: int = 0  # of `gradient` when this step began
    parameter_dtype: torch.dtype = field(init=False)  # when the slot was made
    shape: torch.Size = field(init=False)  # of this rank's part
    shown: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.parameter_dtype = self.parameter.dtype
        self.shape = local_tensor(self.parameter).shape
        self.shown = self.gradient

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def point_at(self, flat: Tensor, offset: int, strides: tuple[int, ...]) -> None:
        """Let the gradient lie in a flat buffer from now on."""
        # The same memory, but not what autograd calls a view: that would keep its first buffer alive for good.
        self.gradient.set_(flat.untyped_storage(), offset, self.shape, strides)
        if isinstance(self.parameter, Sharded):
            if self.shown is self.gradient:
                self.shown = wrap(self.gradient, self.parameter._pypar_sharding)
            with torch._C.DisableTorchFunctionSubclass():
                self.shown.set_(flat.untyped_storage(), offset, self.shape, strides)

    @property
    def is_shown(self) -> bool:
        """Whether the gradient is what parameter.grad shows; not where the bucket has a dtype of its own."""
        return self.gradient.dtype == self.parameter.dtype

    @property
    def is_written(self) -> bool:
        """Whether somebody has written a gradient in this step, with or without a backward."""
        grad = self.parameter.grad
        if not self.is_shown:
            return grad is not None
        if grad is None:
            return False
        return grad is not self.shown or grad._version != self.version


@dataclass(eq=False)
class Bucket:
    """Gradients one after the other, then zeros up to a length that every rank's part divides."""

    flat: Tensor
    num_elements: int  # without the padding
    slots: list[Slot]
    num_ready: int = 0
    num_frozen: int = 0  # slots that are frozen and not ready
    handle: Started | None = None
    wire: Tensor | None = None  # what travels, where that has another dtype

    @property
    def gradients(self) -> Tensor:
        """The flat buffer without its padding."""
        return self.flat[: self.num_elements]

    @property
    def padding_bytes(self) -> int:
        return (self.flat.numel() - self.num_elements) * self.flat.itemsize

    @property
    def is_full(self) -> bool:
        return self.num_ready + self.num_frozen >= len(self.slots)

    def part(self, rank: int, size: int) -> slice:
        """The elements that rank `rank` of `size` has after a reduce-scatter."""
        length = self.flat.numel() // size
        return slice(rank * length, (rank + 1) * length)


def make_slots(named: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None) -> list[Slot]:
    """Slots that have no place yet."""
    return [
        Slot(p, name, torch.empty(0, dtype=dtype or p.dtype, device=p.device, requires_grad=False))
        for name, p in named
    ]


@torch.no_grad()
def fill_buckets(
    slots: Iterable[Slot],
    bucket_bytes: int,
    first_bucket_bytes: int,
    axis: Axis,
    comm_dtype: torch.dtype | None = None,
) -> list[Bucket]:
    """Slots in the order given, cut into buckets of one dtype and device; a bucket closes once it has its bytes.

    What a slot's gradient holds moves with it. What travels lies in memory that the ranks of a host share, if they can:
    the buckets, or wires of comm_dtype. So all ranks call this with the same slots.
    """
    closed: list[list[Slot]] = []
    is_open: dict[tuple[torch.dtype, torch.device], list[Slot]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for slot in slots:
        kind = (slot.gradient.dtype, slot.gradient.device)
        is_open.setdefault(kind, []).append(slot)
        sizes[kind] = sizes.get(kind, 0) + slot.numel * kind[0].itemsize
        if sizes[kind] >= (bucket_bytes if closed else min(first_bucket_bytes, bucket_bytes)):
            closed.append(is_open.pop(kind))
            sizes[kind] = 0
    closed += is_open.values()
    return [_bucket(members, axis, comm_dtype) for members in closed]


def _bucket(members: list[Slot], axis: Axis, comm_dtype: torch.dtype | None) -> Bucket:
    old = members[0].gradient
    num_elements = sum(slot.numel for slot in members)
    unit = axis.size * PART_BYTES // old.itemsize
    length = -(-num_elements // unit) * unit
    if comm_dtype is None or comm_dtype == old.dtype or axis.size == 1:
        bucket = Bucket(shared_empty(length, old.dtype, axis, old.device).zero_(), num_elements, members)
    else:
        wire = shared_empty(length, comm_dtype, axis, old.device).zero_()
        bucket = Bucket(old.new_zeros(length), num_elements, members, wire=wire)
    flat = bucket.flat
    offset = 0
    for slot in members:
        place = flat[offset : offset + slot.numel].view(slot.shape)
        if slot.gradient.shape == place.shape:
            place.copy_(slot.gradient)
        slot.point_at(flat, offset, place.stride())
        slot.bucket, slot.offset = bucket, offset
        offset += place.numel()
    return bucket


def shard_of(bucket: Bucket, rank: int, size: int) -> tuple[Tensor, list[tuple[nn.Parameter, slice, slice]]]:
    """(this rank's part of the flat buffer, [(parameter, its flat elements, where they lie in the part)])."""
    part = bucket.part(rank, size)
    pieces = []
    for slot in bucket.slots:
        begin = max(part.start, slot.offset)
        end = min(part.stop, slot.offset + slot.numel)
        if begin < end:
            own = slice(begin - slot.offset, end - slot.offset)
            pieces.append((slot.parameter, own, slice(begin - part.start, end - part.start)))
    return bucket.flat[part], pieces


@torch.no_grad()
def take_in(slot: Slot) -> None:
    """Bring what parameter.grad holds into the bucket, and make parameter.grad the bucket's view where dtypes
    agree.
    """
    grad = slot.parameter.grad
    if not slot.is_shown:
        if grad is not None:
            slot.gradient.add_(local_tensor(grad))
        slot.parameter.grad = None
        return
    if grad is not None and grad is not slot.shown:
        grad = local_tensor(grad).detach()
        move(grad.to_dense() if grad.is_sparse else grad, slot.gradient)
    slot.parameter.grad = slot.shown
