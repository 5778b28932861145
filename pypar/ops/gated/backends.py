"""Gated activations by the native kernels, by Triton and by the definition."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.gated.definition import ACTIVATIONS, operands, reference_backward, reference_forward
from pypar.ops.rows import as_rows, native_refusal


def _native_forward(
    gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float, interleaved: bool
) -> Tensor:
    out = torch.empty(_out_shape(gate, up), dtype=gate.dtype)
    gate_rows, up_rows = _places(as_rows(gate), _rows_or_none(up), interleaved)
    native.run(
        native.module().gated_forward,
        gate_rows, up_rows, out, gate_rows.shape[0], out.shape[-1], gate_rows.stride(0), up_rows.stride(0),
        ACTIVATIONS.index(activation), interleaved, alpha, limit, native.dtype_code(gate), native.num_threads(),
    )  # fmt: skip
    return out


def _native_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype)
    dup = torch.empty((0,) if up is None else up.shape, dtype=gate.dtype)
    dout_rows = as_rows(dout)
    gate_rows, up_rows = _places(as_rows(gate), _rows_or_none(up), interleaved)
    dgate_rows, dup_rows = _places(as_rows(dgate), None if up is None else as_rows(dup), interleaved)
    native.run(
        native.module().gated_backward,
        dout_rows, gate_rows, up_rows, dgate_rows, dup_rows, dout_rows.shape[0], dout_rows.shape[1],
        dout_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), dgate_rows.stride(0), dup_rows.stride(0),
        ACTIVATIONS.index(activation), interleaved, alpha, limit, native.dtype_code(gate), native.num_threads(),
    )  # fmt: skip
    return dgate, dup


def _places(gate: Tensor, up: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rows where kernels find gate and up: both in the first where they take turns."""
    return (gate, gate) if interleaved else operands(gate, up, interleaved)


def _out_shape(gate: Tensor, up: Tensor | None) -> torch.Size:
    return gate.shape if up is not None else torch.Size((*gate.shape[:-1], gate.shape[-1] // 2))


def _rows_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _triton_forward(
    gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float, interleaved: bool
) -> Tensor:
    kernels = importlib.import_module("pypar.kernels.gated")
    rows = _places(as_rows(gate), _rows_or_none(up), interleaved)
    out = kernels.gated_forward(*rows, activation, alpha, limit, interleaved)
    return out.view(_out_shape(gate, up))


def _triton_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("pypar.kernels.gated")
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = gate.new_empty((0,) if up is None else up.shape)
    rows = _places(as_rows(gate), _rows_or_none(up), interleaved)
    gradient_rows = _places(as_rows(dgate), None if up is None else as_rows(dup), interleaved)
    kernels.gated_backward(as_rows(dout), *rows, *gradient_rows, activation, alpha, limit, interleaved)
    return dgate, dup


def _native_unsupported(gate: Tensor, up: Tensor | None) -> str | None:
    return native_refusal(gate) if up is None else native_refusal(gate, up)


def _triton_unsupported(gate: Tensor, up: Tensor | None) -> str | None:
    return triton_refusal(gate, up)


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("triton", _triton_forward, _triton_backward, _triton_unsupported),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)
