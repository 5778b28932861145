"""The gated activation of a Llama-style feed-forward block: silu(gate) * up (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype, as_rows, native_refusal


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """gate * sigmoid(gate) * up, computed in fp32 and rounded once.

    gate, up: [..., F] of one dtype, any strides (the halves of one [..., 2F] tensor need no copy). Returns
    [..., F] of that dtype, contiguous. ValueError: shapes or dtypes that differ, a backend that refuses.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() < 1:
        raise ValueError(
            f"up {tuple(up.shape)} {up.dtype} must match gate {tuple(gate.shape)} {gate.dtype}, of at least "
            f"one dimension; broadcast or convert it first"
        )
    chosen = choose("swiglu", BACKENDS, {"gate": gate, "up": up}, backend)
    return _forward(gate, up, chosen.name)


def reference_forward(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    dtype = accumulate_dtype(gate)
    return (torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype).contiguous()


def reference_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(gate): dup = dout * gate * s, dgate = dout * up * s * (1 + gate * (1 - s))."""
    dtype = accumulate_dtype(gate)
    wide_dout, wide_gate = dout.to(dtype), gate.to(dtype)
    sigmoid = torch.sigmoid(wide_gate)
    dup = wide_dout * wide_gate * sigmoid
    dgate = wide_dout * up.to(dtype) * sigmoid * (1 + wide_gate * (1 - sigmoid))
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def _native_unsupported(gate: Tensor, up: Tensor) -> str | None:
    return native_refusal(gate, up)


def _native_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate_rows, up_rows = as_rows(gate), as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    native.run(
        native.module().swiglu_forward,
        gate_rows, up_rows, out, gate_rows.shape[0], gate_rows.shape[1],
        gate_rows.stride(0), up_rows.stride(0), native.dtype_code(gate), native.num_threads(),
    )  # fmt: skip
    return out


def _native_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dout_rows, gate_rows, up_rows = as_rows(dout), as_rows(gate), as_rows(up)
    dgate = torch.empty(gate.shape, dtype=gate.dtype)
    dup = torch.empty(up.shape, dtype=up.dtype)
    native.run(
        native.module().swiglu_backward,
        dout_rows, gate_rows, up_rows, dgate, dup,
        gate_rows.shape[0], gate_rows.shape[1], dout_rows.stride(0), gate_rows.stride(0), up_rows.stride(0),
        native.dtype_code(gate), native.num_threads(),
    )  # fmt: skip
    return dgate, dup


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)


def _fake_forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(dout: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *_backward(dout, gate, up, ctx.backend), None


_forward = register(
    "swiglu", "forward", "(Tensor gate, Tensor up, str backend) -> Tensor", BACKENDS, _fake_forward
)
_backward = register(
    "swiglu",
    "backward",
    "(Tensor dout, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_backward,
)
register_gradient("swiglu", _gradient, _save)
