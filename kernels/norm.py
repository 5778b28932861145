"""What rms_norm and layer_norm share in Triton: CENTER takes a row's mean off first.

A row's statistics come from its registers: the mean, then the squares of what is left.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches
from .rows import load_rows, row_tile, rows_per_sum, store_rows, sum_launch

LARGEST_ROW = (
    8192  # elements; the sums that backward keeps of longer ones do not fit the registers of a program
)


def norm_forward(given: Any, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NormOutputs of NormInputs of pypar.ops.norm (read here, not imported), of rows [R, D] with adjacent elements."""
    x, residual = given.x, given.residual
    R, D = x.shape
    out = x.new_empty(R, D)
    total = x.new_empty((0,) if residual is None else (R, D))
    mean, rstd = (x.new_empty(size, dtype=torch.float32) for size in (R if center else 0, R))
    tile = row_tile(D)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": given.weight,
        "bias_ptr": given.bias,
        "out_ptr": out,
        "sum_ptr": total,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "R": R,
        "stride_x": x.stride(0),
        "stride_residual": 0 if residual is None else residual.stride(0),
        "eps": given.eps,
        "weight_offset": given.weight_offset,
        "D": D,
        **tile.blocks,
        "CENTER": center,
    }
    programs = triton.cdiv(R, tile.BLOCK_ROWS)
    run_launches([Launch(_norm_forward_kernel, programs, arguments, tile.num_warps, 1)], x)
    return out, total, mean, rstd


def norm_backward(saved: Any, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """NormGradients of NormSaved of pypar.ops.norm (read here, not imported), of rows as forward takes them."""
    x, dout, dsum, weight, has_bias = saved.x, saved.dout, saved.dsum, saved.weight, saved.has_bias
    R, D = x.shape
    dx = x.new_empty(R, D)
    tile = row_tile(D, max_warps=16)
    rows = rows_per_sum(R)
    programs = triton.cdiv(R, rows)
    parts = [
        x.new_empty((programs, D) if there else (0, 0), dtype=torch.float32)
        for there in (weight is not None, has_bias)
    ]
    arguments: dict[str, Any] = {
        "dout_ptr": dout,
        "dsum_ptr": dsum,
        "x_ptr": x,
        "weight_ptr": weight,
        "mean_ptr": saved.mean,
        "rstd_ptr": saved.rstd,
        "dx_ptr": dx,
        "dweight_ptr": None if weight is None else parts[0],
        "dbias_ptr": parts[1] if has_bias else None,
        "R": R,
        "stride_dout": dout.stride(0),
        "stride_dsum": 0 if dsum is None else dsum.stride(0),
        "stride_x": x.stride(0),
        "weight_offset": saved.weight_offset,
        "rows_per_program": rows,
        "D": D,
        **tile.blocks,
        "CENTER": center,
    }
    launches = [Launch(_norm_backward_kernel, programs, arguments, tile.num_warps, 1)]
    sums = [x.new_empty(part.shape[1], dtype=torch.float32) for part in parts]
    launches += [sum_launch(part, total) for part, total in zip(parts, sums, strict=True)]
    run_launches(launches, x)
    return dx, *sums


@triton.jit(do_not_specialize=["R"])
def _norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    stride_x,
    stride_residual,
    eps,
    weight_offset,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < R)[:, None] & (column < D)[None, :]
    x = load_rows(x_ptr, row, stride_x, column, inside)
    if residual_ptr is not None:
        x += load_rows(residual_ptr, row, stride_residual, column, inside)
        x = store_rows(sum_ptr, row, D, column, inside, x)
    if CENTER:
        mean = tl.sum(x, 1) / D
        x = tl.where(inside, x - mean[:, None], 0.0)
        left = tl.sum(x, 1) / D  # by which rounding took too little or too much
        x = tl.where(inside, x - left[:, None], 0.0)
        tl.store(mean_ptr + row, mean + left, mask=row < R)
    rstd = tl.div_rn(tl.full((BLOCK_ROWS,), 1.0, tl.float32), tl.sqrt_rn(tl.sum(x * x, 1) / D + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < R)
    out = x * rstd[:, None]
    if weight_ptr is not None:
        out *= load_column_values(weight_ptr, column, D)[None, :] + weight_offset
    if bias_ptr is not None:
        out += load_column_values(bias_ptr, column, D)[None, :]
    store_rows(out_ptr, row, D, column, inside, out)


@triton.jit(do_not_specialize=["R", "rows_per_program"])
def _norm_backward_kernel(
    dout_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    R,
    stride_dout,
    stride_dsum,
    stride_x,
    weight_offset,
    rows_per_program,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
):
    """A program adds up its rows' shares of dweight and dbias, and writes them as row program_id of [programs, D]."""
    column = tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, R)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < last)[:, None] & (column < D)[None, :]
        x = load_rows(x_ptr, row, stride_x, column, inside)
        dout = load_rows(dout_ptr, row, stride_dout, column, inside)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)
        if CENTER:
            x -= tl.load(mean_ptr + row, mask=row < last, other=0.0)[:, None]
        x *= rstd[:, None]  # meets only zeros outside
        g = dout
        if weight_ptr is not None:
            dweight += dout * x
            g = dout * (load_column_values(weight_ptr, column, D)[None, :] + weight_offset)
        if dbias_ptr is not None:
            dbias += dout
        dx = g - x * (tl.sum(g * x, 1) / D)[:, None]
        if CENTER:
            dx -= (tl.sum(g, 1) / D)[:, None]
        dx *= rstd[:, None]
        if dsum_ptr is not None:
            dx += load_rows(dsum_ptr, row, stride_dsum, column, inside)
        store_rows(dx_ptr, row, D, column, inside, dx)
    at = tl.program_id(0) * D + column
    if weight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=column < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=column < D)


@triton.jit
def load_column_values(values_ptr, column, D: tl.constexpr):
    """One value for each column, fp32; 0 outside."""
    return tl.load(values_ptr + column, mask=column < D, other=0.0).to(tl.float32)
