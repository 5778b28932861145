"""Where each gradient lies: parameters cut into flat buffers of one dtype and device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pypar.comm import Handle


@dataclass(eq=False)
class Slot:
    """One parameter and where its gradient lies."""

    parameter: nn.Parameter
    name: str
    gradient: Tensor  # view of the bucket, in the parameter's shape
    bucket: Bucket
    is_ready: bool = False  # its last backward of this step is done
    is_stale: bool = False  # holds the sum of an earlier step, not cleared since

    @property
    def is_shown(self) -> bool:
        """Whether the gradient is what parameter.grad shows; not where the bucket has a dtype of its own."""
        return self.gradient.dtype == self.parameter.dtype


@dataclass(eq=False)
class Bucket:
    flat: Tensor
    slots: list[Slot] = field(default_factory=list)
    num_ready: int = 0
    handle: Handle | None = None


def fill_buckets(
    named: list[tuple[str, nn.Parameter]],
    bucket_bytes: int,
    first_bucket_bytes: int,
    dtype: torch.dtype | None,
) -> list[Bucket]:
    """Parameters in reverse order, cut into buckets of one dtype and device; a bucket closes once it has its
    bytes.
    """
    closed: list[tuple[list[tuple[str, nn.Parameter]], torch.dtype]] = []
    is_open: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for name, parameter in reversed(named):
        kind = (dtype or parameter.dtype, parameter.device)
        is_open.setdefault(kind, []).append((name, parameter))
        sizes[kind] = sizes.get(kind, 0) + parameter.numel() * kind[0].itemsize
        if sizes[kind] >= (bucket_bytes if closed else min(first_bucket_bytes, bucket_bytes)):
            closed.append((is_open.pop(kind), kind[0]))
            sizes[kind] = 0
    closed += [(members, kind[0]) for kind, members in is_open.items()]
    return [_bucket(members, kind) for members, kind in closed]


def _bucket(members: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> Bucket:
    total = sum(p.numel() for _, p in members)
    bucket = Bucket(torch.zeros(total, dtype=dtype, device=members[0][1].device))
    parts = bucket.flat.split([p.numel() for _, p in members])
    for (name, parameter), part in zip(members, parts, strict=True):
        bucket.slots.append(Slot(parameter, name, part.view(parameter.shape), bucket))
    return bucket


@torch.no_grad()
def take_in(slot: Slot) -> None:
    """Bring what parameter.grad holds into the bucket, and make parameter.grad the bucket's view where dtypes
    agree.
    """
    grad = slot.parameter.grad
    if not slot.is_shown:
        if grad is not None:
            slot.gradient.add_(grad)
        slot.parameter.grad = None
        return
    if grad is not None:
        slot.gradient.copy_(grad.detach().to_dense() if grad.is_sparse else grad.detach())
    slot.parameter.grad = slot.gradient
