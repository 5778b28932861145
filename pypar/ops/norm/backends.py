"""rms_norm and layer_norm by the native kernels, by Triton and by the definition."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.norm.definition import (
    NormGradients,
    NormInputs,
    NormOutputs,
    NormSaved,
    reference_backward,
    reference_forward,
)
from pypar.ops.rows import as_rows, native_refusal

# The gradients of weight and bias are summed in blocks of rows, whose number does not depend on the number of threads:
# enough blocks for the threads of a large machine and for short, exact chains, and enough rows in each that
# adding the blocks up costs little.
_MAX_BLOCKS = 256
_MIN_BLOCK_ROWS = 16

_LARGEST_TRITON_ROW = 8192  # LARGEST_ROW of kernels/norm.py, which only a machine with Triton can import


def backends_of(op: str, center: bool) -> tuple[Backend, ...]:
    """Those of rms_norm or layer_norm, by the kernels of that name; center: whether its rows are centered."""
    return (
        Backend(
            "native",
            partial(_native_forward, op, center=center),
            partial(_native_backward, op),
            _native_unsupported,
        ),
        Backend(
            "triton",
            partial(_triton_forward, op, center=center),
            partial(_triton_backward, op),
            _triton_unsupported,
        ),
        Backend(
            "reference",
            partial(reference_forward, center=center),
            partial(reference_backward, center=center),
            never_refuses,
        ),
    )


def _native_forward(op: str, given: NormInputs, center: bool) -> NormOutputs:
    x, residual = given.x, given.residual
    rows, residual_rows = as_rows(x), _rows_or_none(residual)
    num_rows, D = rows.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    total = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype)
    mean = torch.empty(x.shape[:-1] if center else (0,))
    rstd = torch.empty(x.shape[:-1])
    scale = _scale(given.weight, given.weight_offset, D)
    shift = torch.zeros(D) if given.bias is None else given.bias.float().contiguous()
    native.run(
        getattr(native.module(), f"{op}_forward"),
        rows, _or_null(residual_rows), scale, shift, out, total, mean, rstd,
        num_rows, D, rows.stride(0), _stride(residual_rows), given.eps, native.dtype_code(x), native.num_threads(),
    )  # fmt: skip
    return NormOutputs(out, total, mean, rstd)


def _native_backward(op: str, saved: NormSaved) -> NormGradients:
    x, weight, has_bias = saved.x, saved.weight, saved.has_bias
    rows, dout_rows, dsum_rows = as_rows(x), as_rows(saved.dout), _rows_or_none(saved.dsum)
    num_rows, D = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype)
    rows_per_block = max(_MIN_BLOCK_ROWS, -(-num_rows // _MAX_BLOCKS))
    sums = None if weight is None and not has_bias else torch.empty(2, D)
    parts = torch.empty(-(-num_rows // rows_per_block), 2, D if sums is not None else 0)
    scale = _scale(weight, saved.weight_offset, D)
    native.run(
        getattr(native.module(), f"{op}_backward"),
        dout_rows, _or_null(dsum_rows), rows, scale, saved.mean, saved.rstd, dx, _or_null(sums), parts,
        num_rows, D, dout_rows.stride(0), _stride(dsum_rows), rows.stride(0), rows_per_block,
        native.dtype_code(x), native.num_threads(),
    )  # fmt: skip
    dweight = torch.empty(0) if sums is None or weight is None else sums[0].clone()
    dbias = torch.empty(0) if sums is None or not has_bias else sums[1].clone()
    return NormGradients(dx, dweight, dbias)


def _scale(weight: Tensor | None, weight_offset: float, D: int) -> Tensor:
    """What a normalised row is multiplied with: [D], fp32."""
    if weight is None:
        return torch.ones(D)
    return (weight.float() + weight_offset if weight_offset else weight.float()).contiguous()


def _rows_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _or_null(x: Tensor | None) -> Tensor | int:
    """What native.run makes an address of."""
    return 0 if x is None else x


def _triton_forward(op: str, given: NormInputs, center: bool) -> NormOutputs:
    x, residual = given.x, given.residual
    rows = given._replace(
        x=as_rows(x),
        residual=_rows_or_none(residual),
        weight=_contiguous(given.weight),
        bias=_contiguous(given.bias),
    )
    out, total, mean, rstd = importlib.import_module(f"pypar.kernels.{op}").forward(rows)
    stats = x.shape[:-1]
    return NormOutputs(
        out.view(x.shape),
        total if residual is None else total.view(x.shape),
        mean.view(stats) if center else mean,
        rstd.view(stats),
    )


def _triton_backward(op: str, saved: NormSaved) -> NormGradients:
    rows = saved._replace(
        dout=as_rows(saved.dout),
        dsum=_rows_or_none(saved.dsum),
        x=as_rows(saved.x),
        weight=_contiguous(saved.weight),
    )
    dx, dweight, dbias = importlib.import_module(f"pypar.kernels.{op}").backward(rows)
    return NormGradients(dx.view(saved.x.shape), dweight, dbias)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _native_unsupported(x: Tensor, residual: Tensor | None = None, **vectors: Tensor | None) -> str | None:
    return native_refusal(x, *(y for y in (residual, *vectors.values()) if y is not None))


def _triton_unsupported(x: Tensor, residual: Tensor | None = None, **vectors: Tensor | None) -> str | None:
    if x.shape[-1] > _LARGEST_TRITON_ROW:
        return f"a row has {x.shape[-1]} elements, and {_LARGEST_TRITON_ROW} fit a program's registers"
    return triton_refusal(x, residual, *vectors.values())
