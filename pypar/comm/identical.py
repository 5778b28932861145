"""Whether every rank of an axis holds the same tensors, found out with a few bytes of communication."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm.collectives import all_reduce_start

if TYPE_CHECKING:
    from pypar.mesh import Axis

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def first_difference(
    named_tensors: Sequence[tuple[str, Tensor]], axis: Axis, *, values: bool = True
) -> str | None:
    """What differs between the ranks of the axis, as a phrase; None where names, shapes, dtypes and, unless
    told otherwise, values are the same.

    Values are compared by a checksum (the sum of their bit patterns). Every rank of the axis calls this and
    every rank gets the same answer; meta tensors have no values to compare.
    """
    if axis.size == 1:
        return None
    described = [f"{name} {tuple(x.shape)} {x.dtype}" for name, x in named_tensors]
    sums = [_checksum(x) for _, x in named_tensors] if values else []
    device = next((x.device for _, x in named_tensors if not x.is_meta), torch.device("cpu"))
    same_list, same_values = _all_equal([_digest(described), _digest(sums)], axis, device)
    if not same_list:
        return "the list of names, shapes and dtypes"
    if same_values:
        return None
    equal = _all_equal([_digest(s) for s in sums], axis, device)
    different = [name for (name, _), same in zip(named_tensors, equal, strict=True) if not same]
    return different[0] if len(different) == 1 else f"{different[0]} and {len(different) - 1} more"


def _checksum(x: Tensor) -> int:
    if x.is_meta or not x.numel():
        return 0
    return int(
        x.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[x.element_size()]).sum(dtype=torch.int64)
    )


def _digest(value: object) -> int:
    """62 bits, so that the number and its negative are int64."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 2


def _all_equal(values: list[int], axis: Axis, device: torch.device) -> list[bool]:
    """For each value whether it is the same on every rank: max(v) = -max(-v)."""
    both = torch.tensor([values, [-v for v in values]], dtype=torch.int64, device=device)
    largest, negated_smallest = all_reduce_start(both, axis, dist.ReduceOp.MAX).wait().tolist()
    return [high == -low for high, low in zip(largest, negated_smallest, strict=True)]
