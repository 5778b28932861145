"""Tensors seen as rows: what the operators that work along the last dimension share."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops import native

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_MISSING = (
    native.missing()
)  # looked up here, once, since torch.compile cannot trace the loading of a module


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator computes: float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D], elements of a row adjacent. A view where the strides allow, else a copy."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


def native_refusal(x: Tensor, *others: Tensor) -> str | None:
    """Why the native kernels cannot take x, whose dtype they compute in, with `others`; or None."""
    if x.dtype not in _NATIVE_DTYPES:
        return f"{str(x.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
    for tensor in (x, *others):
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, and a tensor is on {tensor.device}"
    return _NATIVE_MISSING
