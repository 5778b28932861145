"""What kernels of operators along the last dimension share: how rows are cut into tiles, and sums over rows.

A program holds whole rows in registers, so that what it loads once it need not load again.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_ELEMENTS = 2048  # of a tile of short rows: 16 for each of 128 threads, two loads of 16 bytes of bfloat16
_COLUMNS = 64  # of a program that sums over rows
_MAX_SUMS = 256  # rows are summed in so many parts at most, by so many programs
_MIN_ROWS_PER_SUM = 16


class RowTile(NamedTuple):
    """BLOCK_ROWS rows, padded to BLOCK_D elements each, and the warps that hold them."""

    BLOCK_ROWS: int
    BLOCK_D: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_ROWS": self.BLOCK_ROWS, "BLOCK_D": self.BLOCK_D}


def row_tile(D: int, max_warps: int = 32) -> RowTile:
    """16 elements a thread of each tensor where max_warps allows it, and many short rows at once."""
    block_d = triton.next_power_of_2(max(D, 1))
    block_rows = max(1, _ELEMENTS // block_d)
    return RowTile(block_rows, block_d, min(max(block_rows * block_d // 512, 4), max_warps))


def rows_per_sum(rows: int) -> int:
    """How many rows one program adds up. It goes by their number alone, so that sums do not depend on the device."""
    return max(_MIN_ROWS_PER_SUM, triton.cdiv(rows, _MAX_SUMS))


def sum_launch(parts: Tensor, out: Tensor) -> Launch:
    """out [D] = the sum of the rows of parts [P, D], fp32 both, in a fixed order."""
    D = out.numel()
    arguments: dict[str, Any] = {"parts_ptr": parts, "out_ptr": out, "P": parts.shape[0]}
    arguments |= {"D": D, "BLOCK_P": 32, "BLOCK_D": _COLUMNS}
    return Launch(_sum_rows_kernel, triton.cdiv(D, _COLUMNS), arguments, 4, 1)


@triton.jit(do_not_specialize=["P"])
def _sum_rows_kernel(parts_ptr, out_ptr, P, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    part = tl.arange(0, BLOCK_P)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        inside = (first + part < P)[:, None] & (column < D)[None, :]
        total += tl.load(parts_ptr + (first + part)[:, None] * D + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < D)


@triton.jit
def load_rows(x_ptr, row, stride, column, inside, other: tl.constexpr = 0.0):
    """The elements `column` of rows `row`, stride apart, in fp32; `other` outside."""
    at = x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at, mask=inside, other=other).to(tl.float32)


@triton.jit
def store_rows(x_ptr, row, stride, column, inside, value):
    """Rounds `value` to x's dtype and writes it to where load_rows reads; returns what was written, in fp32."""
    rounded = value.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], rounded, mask=inside)
    return rounded.to(tl.float32)
