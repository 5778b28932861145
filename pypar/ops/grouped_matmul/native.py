"""grouped_matmul on CPU: groups of few rows by a kernel that reads each matrix once, others by torch's products.

A product of few rows is limited by reading the matrix, which a BLAS packs first; for 16 rows and less that costs it
most of its rate. 16-bit products of a processor without instructions for them are the kernel's too, whatever the size:
on AMD Zen 3 torch's take 2 to 60 times as long as its fp32 products.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.grouped_matmul.definition import spans
from pypar.ops.linear_cross_entropy.products import multiply_into

_FEW = 16  # rows up to which the kernel is the faster one

Spans = list[tuple[int, int, int]]


def forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    few, many, end = _groups(x, counts)
    x, weight = adjacent(x), _matrices(weight)
    out = torch.empty(len(x), weight.shape[1], dtype=x.dtype)
    out[end:] = 0
    _rows_product(x, weight.mT, out, few)
    for e, start, stop in many:
        multiply_into(out[start:stop], x[start:stop], weight[e])
    return out


def input_gradient(dout: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    few, many, end = _groups(dout, counts)
    dout, weight = adjacent(dout), _matrices(weight)
    dx = torch.empty(len(dout), weight.shape[2], dtype=dout.dtype)
    dx[end:] = 0
    _rows_product(dout, weight, dx, few)
    for e, start, stop in many:
        multiply_into(dx[start:stop], dout[start:stop], weight[e].t())
    return dx


def weight_gradient(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    few, many, _ = _groups(x, counts)
    dout, x = adjacent(dout), adjacent(x)
    dweight = torch.empty_like(weight)
    found = {e for e, _, _ in (*few, *many)}
    few = [*few, *((e, 0, 0) for e in range(len(weight)) if e not in found)]  # their gradient is zero
    made = _matrices(dweight)
    dense = made is dweight  # and not of odd strides
    by_rows = made.stride(2) == 1
    made, left, right = (made, dout, x) if by_rows else (made.mT, x, dout)
    _outer_product(left, right, made, few)
    for e, start, stop in many:
        multiply_into(made[e], left[start:stop].t(), right[start:stop].t())
    if not dense:
        dweight.copy_(made if by_rows else made.mT)
    return dweight


def backward(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return input_gradient(dout, weight, counts), weight_gradient(dout, x, weight, counts)


def _groups(x: Tensor, counts: Tensor) -> tuple[Spans, Spans, int]:
    """(groups for the kernel, groups for torch's products, where the last group ends)."""
    found = spans(counts, len(x))
    most = _FEW if torch_multiplies_fast(x.dtype) else len(x)
    few = [span for span in found if span[2] - span[1] <= most]
    many = [span for span in found if span[2] - span[1] > most]
    return few, many, found[-1][2] if found else 0


@functools.cache
def torch_multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether torch's matrix products of this dtype use instructions of this processor for it."""
    if dtype == torch.float32:
        return True
    isas = native.module().supported_isas()
    return ("amx_fp16" if dtype == torch.float16 else "avx512_bf16") in isas


def adjacent(x: Tensor) -> Tensor:
    """x [R, D] whose rows are adjacent elements. A view where the strides allow, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _matrices(weight: Tensor) -> Tensor:
    """[E, N, K] whose rows or whose columns are adjacent elements. A view where the strides allow, else a copy."""
    return weight if 1 in weight.stride()[1:] else weight.contiguous()


def _rows_product(x: Tensor, matrices: Tensor, out: Tensor, groups: Spans) -> None:
    """out[r] = x[r] @ matrices[e], [E, depth, size], for the rows of groups."""
    by_columns = matrices.stride(2) == 1
    run = native.module().grouped_matmul_sums if by_columns else native.module().grouped_matmul_dots
    stride = matrices.stride(1) if by_columns else matrices.stride(2)
    if groups and out.numel():
        native.run(
            run, x, matrices, out, _table(groups), len(groups), matrices.shape[1], matrices.shape[2],
            x.stride(0), stride, matrices.stride(0), out.stride(0), 0,
            native.dtype_code(x), native.num_threads(),
        )  # fmt: skip


def _outer_product(x: Tensor, y: Tensor, out: Tensor, groups: Spans) -> None:
    """out[e] [E, depth, size] = the sum over the rows of groups of x[r].T y[r]; out's rows are adjacent elements."""
    if groups and out.numel():
        native.run(
            native.module().grouped_matmul_outer, x, y, out, _table(groups),
            len(groups), out.shape[1], out.shape[2],
            x.stride(0), y.stride(0), 0, out.stride(1), out.stride(0),
            native.dtype_code(x), native.num_threads(),
        )  # fmt: skip


def _table(groups: Spans) -> Tensor:
    """[groups, 3] int64: matrix, first row, number of rows; the largest first, so that threads end together."""
    ordered = sorted(groups, key=lambda span: span[1] - span[2])
    return torch.tensor([(e, start, end - start) for e, start, end in ordered], dtype=torch.int64)
