"""Tensors in memory that the ranks of an axis share, which an all_reduce need not copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pypar.comm.process_group import ProcessGroup
from pypar.ops.uncompiled import between_ranks, uncompiled

if TYPE_CHECKING:
    from pypar.mesh import Axis

_PART_BYTES = 4096


@uncompiled("it looks at a process group")
def shares_memory(axis: Axis) -> bool:
    """Whether what CPU tensors of the axis send goes through memory of the one host that its ranks are on."""
    return _group(axis) is not None


def _group(axis: Axis) -> ProcessGroup | None:
    return axis.group if type(axis.group) is ProcessGroup else None


@between_ranks("shared_empty")
def shared_empty(numel: int, dtype: torch.dtype, axis: Axis, device: torch.device | str = "cpu") -> Tensor:
    """A flat tensor [numel] for collectives over the axis. Every rank of the axis calls this, with the same arguments.

    Over the backend "pypar" inside one host a CPU tensor lies in memory that all ranks of the axis have mapped, each
    with a part of its own: `all_reduce` of it, or of the same part of it on every rank, sums where it lies. The memory
    is freed when no rank holds a tensor in it any more. On an axis of one rank, another backend, several hosts
    or another device it is an ordinary empty tensor. A forked process shares it with its parent: let it not write.

    RuntimeError: ranks ask for different sizes, or the memory cannot be had.
    """
    num_bytes = numel * dtype.itemsize
    group = _group(axis)
    if axis.size == 1 or not numel or torch.device(device).type != "cpu" or group is None:
        return torch.empty(numel, dtype=dtype, device=device)
    memory = group.map_memory(-(-num_bytes // _PART_BYTES) * _PART_BYTES)
    return torch.frombuffer(memory, dtype=dtype, count=numel)
