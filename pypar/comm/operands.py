"""Tensors as the native collectives take them: addresses, sizes in bytes, numbers for types and operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pypar.ops.native import address

# ShmType in csrc/shm/reduce.h.
_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.bool: 9,
}
_BYTES = 10
_LAST_FLOAT = 3
# Numbers of torch's ReduceOp, which are ShmOp's too: no bits of floats, no AVG of integers.
_FLOAT_OPS = frozenset(range(5))
_INTEGER_OPS = frozenset(range(8)) - {1}
_OP_NAMES = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")

Parts = list[tuple[int, int]]


def dense(tensor: Tensor, copies: list, reads: bool, writes: bool = True) -> Tensor:
    """The tensor's elements one after the other: itself, or a copy that is noted in `copies` (target, copy, writes)."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(
            f'the backend "pypar" is for dense CPU tensors, this one is {tensor.layout} on {tensor.device}; '
            "use nccl for GPUs, gloo for sparse tensors"
        )
    is_plain = not (tensor.is_neg() or tensor.is_conj())  # what memory holds is what the tensor says
    if is_plain and tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach())
    if is_plain and tensor.is_contiguous():
        copies.append((tensor, tensor, False))  # keeps it alive
        return tensor
    tensor = tensor.detach()
    if reads:
        copy = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    else:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    copies.append((tensor, copy, writes))
    return torch.view_as_real(copy) if copy.is_complex() else copy


def part(x: Tensor) -> tuple[int, int]:
    return address(x), x.numel() * x.element_size()


def type_code(x: Tensor) -> int:
    return _TYPES.get(x.dtype, _BYTES)


def in_background(opts: Any) -> bool:
    return opts is None or opts.asyncOp


def reduction(x: Tensor, reduce_op: Any) -> tuple[int, int]:
    """(type, operation) as the native code numbers them."""
    op = int(getattr(reduce_op, "op", reduce_op))
    code = type_code(x)
    if op not in (_FLOAT_OPS if code <= _LAST_FLOAT else _INTEGER_OPS) or code == _BYTES:
        name = _OP_NAMES[op] if op < len(_OP_NAMES) else str(op)
        raise ValueError(
            f'the backend "pypar" cannot reduce {x.dtype} with {name}; floating point takes SUM, AVG, PRODUCT, '
            "MIN, MAX, integers all but AVG, and float8 has to be converted"
        )
    return code, op


def equal_parts(x: Tensor, size: int, name: str, numel: int) -> Parts:
    """Equal parts of a contiguous tensor."""
    if x.numel() != numel:
        raise ValueError(f"{name} has {x.numel()} elements; with {size} ranks it must have {numel}")
    address, num_bytes = part(x)
    return [(address + r * (num_bytes // size), num_bytes // size) for r in range(size)]


def row_parts(flat: Tensor, x: Tensor, splits: Sequence[int] | None, size: int, name: str) -> Parts:
    """Parts of a contiguous tensor's first dimension, equal ones without `splits`."""
    rows = x.shape[0] if x.dim() else 1
    if not splits:
        if rows % size:
            raise ValueError(
                f"{name}'s first dimension ({rows}) must divide by the number of ranks ({size}) without split sizes"
            )
        splits = [rows // size] * size
    if len(splits) != size or sum(splits) != rows:
        raise ValueError(
            f"{name}'s split sizes {list(splits)} must be {size} numbers that sum to its first dimension ({rows})"
        )
    address, num_bytes = part(flat)
    row_bytes = num_bytes // rows if rows else 0
    parts = []
    for split in splits:
        parts.append((address, split * row_bytes))
        address += split * row_bytes
    return parts
