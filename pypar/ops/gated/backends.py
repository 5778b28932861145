"""Gated activations by the native kernels, by Triton and by the definition."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.gated.definition import (
    ACTIVATIONS,
    Gate,
    GatedInputs,
    operands,
    reference_backward,
    reference_forward,
)
from pypar.ops.rows import as_rows, native_refusal


def _native_forward(given: GatedInputs) -> Tensor:
    out = torch.empty(given.out_shape, dtype=given.gate.dtype)
    gate, up = _places(given.gate, given.up, given.how)
    native.run(
        native.module().gated_forward,
        gate, up, out, gate.shape[0], out.shape[-1], gate.stride(0), up.stride(0), *_native_how(given),
    )  # fmt: skip
    return out


def _native_backward(dout: Tensor, given: GatedInputs) -> tuple[Tensor, Tensor]:
    dgate, dup = _new_gradients(given)
    dout_rows = as_rows(dout)
    rows = (dout_rows, *_places(given.gate, given.up, given.how), *_gradient_places(dgate, dup, given))
    native.run(
        native.module().gated_backward,
        *rows, *dout_rows.shape, *(x.stride(0) for x in rows), *_native_how(given),
    )  # fmt: skip
    return dgate, dup


def _native_how(given: GatedInputs) -> tuple[Any, ...]:
    how = given.how
    activation = ACTIVATIONS.index(how.activation)
    dtype, threads = native.dtype_code(given.gate), native.num_threads()
    return activation, how.interleaved, how.alpha, how.limit, dtype, threads


def _new_gradients(given: GatedInputs) -> tuple[Tensor, Tensor]:
    """Memory for (dgate, dup); dup is empty where there is no up."""
    return given.gate.new_empty(given.gate.shape), given.gate.new_empty(
        (0,) if given.up is None else given.up.shape
    )


def _places(gate: Tensor, up: Tensor | None, how: Gate) -> tuple[Tensor, Tensor]:
    """Rows where kernels find gate and up: both in the first where they take turns."""
    gate, up = as_rows(gate), None if up is None else as_rows(up)
    return (gate, gate) if how.interleaved else operands(gate, up, how.interleaved)


def _gradient_places(dgate: Tensor, dup: Tensor, given: GatedInputs) -> tuple[Tensor, Tensor]:
    return _places(dgate, None if given.up is None else dup, given.how)


def _triton_forward(given: GatedInputs) -> Tensor:
    kernels = importlib.import_module("pypar.kernels.gated")
    gate, up = _places(given.gate, given.up, given.how)
    return kernels.gated_forward(gate, up, given.how).view(given.out_shape)


def _triton_backward(dout: Tensor, given: GatedInputs) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("pypar.kernels.gated")
    dgate, dup = _new_gradients(given)
    rows = _places(given.gate, given.up, given.how), _gradient_places(dgate, dup, given)
    kernels.gated_backward(as_rows(dout), *rows, given.how)
    return dgate, dup


def _native_unsupported(gate: Tensor, up: Tensor | None) -> str | None:
    return native_refusal(gate) if up is None else native_refusal(gate, up)


def _triton_unsupported(gate: Tensor, up: Tensor | None) -> str | None:
    return triton_refusal(gate, up)


def _backend(name: str, forward: Any, backward: Any, unsupported: Any) -> Backend:
    """forward and backward take a record, and the operators pass gate, up and a Gate's fields."""
    return Backend(
        name,
        lambda gate, up, *how: forward(GatedInputs(gate, up, Gate(*how))),
        lambda dout, gate, up, *how: backward(dout, GatedInputs(gate, up, Gate(*how))),
        unsupported,
    )


BACKENDS = (
    _backend("native", _native_forward, _native_backward, _native_unsupported),
    _backend("triton", _triton_forward, _triton_backward, _triton_unsupported),
    _backend("reference", reference_forward, reference_backward, never_refuses),
)
