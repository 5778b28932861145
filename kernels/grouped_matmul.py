"""grouped_matmul in Triton: a program finds its group from the counts on the device, so that nobody waits for them.

Every group is cut into tiles of rows of its own. How many tiles there are in all is not known when kernels are
launched, but at most one a group more than if the rows were one group: what is too much ends at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches

_STAGES = 3
_OUTER_ROWS = 32  # of a group that are added at a time


class _Tile(NamedTuple):
    """The sizes of a program's tile: M rows and N columns of the result; K terms are multiplied at a time."""

    M: int
    N: int
    K: int


def _tile(x: Tensor, groups: int) -> _Tile:
    """As few rows as the groups have on average: the products of the others would be thrown away."""
    rows = triton.next_power_of_2(triton.cdiv(max(len(x), 1), groups))
    return _Tile(min(max(rows, 16), 64), 128, 64) if x.itemsize < 4 else _Tile(min(max(rows, 16), 64), 64, 32)


def _num_warps(x: Tensor, *sizes: int) -> int:
    """4, or 8 where what 128 threads hold does not fit their registers: fp32, or rows whose elements have an address
    each, as 16 do not divide their number."""
    return 8 if x.itemsize == 4 or any(size % 16 for size in sizes) else 4


def rows_product(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """out [R, size]: x [R, depth] @ matrices [E, depth, size][e] for the rows of group e, zeros past the last.

    Elements of a row of x are adjacent; matrices have any strides.
    """
    (R, depth), (E, _, size) = x.shape, matrices.shape
    out = x.new_empty(R, size)
    tile = _tile(x, E)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "matrices_ptr": matrices,
        "counts_ptr": counts.contiguous(),
        "out_ptr": out,
        "R": R,
        "stride_x": x.stride(0),
        "stride_e": matrices.stride(0),
        "stride_k": matrices.stride(1),
        "stride_n": matrices.stride(2),
        "DEPTH": depth,
        "SIZE": size,
        "E": E,
        "BLOCK_E": triton.next_power_of_2(E + 1),
        "BLOCK_M": tile.M,
        "BLOCK_N": tile.N,
        "BLOCK_K": tile.K,
    }
    programs = (triton.cdiv(R, tile.M) + E + 1) * triton.cdiv(size, tile.N) if R else 0
    num_warps = _num_warps(x, depth, size)
    run_launches([Launch(_rows_product_kernel, programs, arguments, num_warps, _STAGES)], x)
    return out


def outer_product(x: Tensor, y: Tensor, out: Tensor, counts: Tensor) -> Tensor:
    """out [E, depth, size], any strides: the sum of x[r].T y[r] over the rows r of each group.

    x: [R, depth], y: [R, size], elements of a row adjacent.
    """
    E, depth, size = out.shape
    tile = _tile(x, 1)._replace(M=64)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "y_ptr": y,
        "counts_ptr": counts.contiguous(),
        "out_ptr": out,
        "R": len(x),
        "stride_x": x.stride(0),
        "stride_y": y.stride(0),
        "stride_e": out.stride(0),
        "stride_m": out.stride(1),
        "stride_n": out.stride(2),
        "DEPTH": depth,
        "SIZE": size,
        "E": E,
        "BLOCK_E": triton.next_power_of_2(E),
        "BLOCK_M": tile.M,
        "BLOCK_N": tile.N,
        "BLOCK_R": _OUTER_ROWS,
    }
    programs = E * triton.cdiv(depth, tile.M) * triton.cdiv(size, tile.N)
    num_warps = _num_warps(x, depth, size)
    run_launches([Launch(_outer_product_kernel, programs, arguments, num_warps, _STAGES)], x)
    return out


@triton.jit
def _group_of_tile(counts_ptr, tile, R, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of its rows) of a tile; group E has the rows past the last. No tile: end is 0."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    count = tl.where(e == E, tl.maximum(R - tl.sum(count, 0), 0), count)
    end = tl.cumsum(count, 0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.cumsum(tiles, 0) - tiles
    is_mine = (tile >= first_tile) & (tile < first_tile + tiles)
    group = tl.sum(tl.where(is_mine, e, 0), 0)
    row = tl.sum(tl.where(is_mine, end - count + (tile - first_tile) * BLOCK_M, 0), 0)
    return group, row, tl.minimum(tl.sum(tl.where(is_mine, end, 0), 0), R)


@triton.jit(do_not_specialize=["R"])
def _rows_product_kernel(
    x_ptr, matrices_ptr, counts_ptr, out_ptr, R, stride_x, stride_e, stride_k, stride_n,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(SIZE, BLOCK_N)
    group, first, end = _group_of_tile(counts_ptr, tl.program_id(0) // blocks, R, E, BLOCK_E, BLOCK_M)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_x
        matrix = matrices_ptr + group.to(tl.int64) * stride_e + n.to(tl.int64)[None, :] * stride_n
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k_first in range(0, DEPTH, BLOCK_K):
            k = k_first + tl.arange(0, BLOCK_K)
            there = (k < DEPTH) & (group < E)
            left = tl.load(x_rows + k[None, :], mask=(row < end)[:, None] & there[None, :], other=0.0)
            right = tl.load(
                matrix + k.to(tl.int64)[:, None] * stride_k,
                mask=there[:, None] & (n < SIZE)[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        at = out_ptr + row.to(tl.int64)[:, None] * SIZE + n[None, :]
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(row < end)[:, None] & (n < SIZE)[None, :])


@triton.jit(do_not_specialize=["R"])
def _outer_product_kernel(
    x_ptr, y_ptr, counts_ptr, out_ptr, R, stride_x, stride_y, stride_e, stride_m, stride_n,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(SIZE, BLOCK_N)
    blocks = tl.cdiv(DEPTH, BLOCK_M) * n_blocks
    group = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    start = tl.sum(tl.where(e < group, count, 0), 0)
    end = tl.minimum(start + tl.sum(tl.where(e == group, count, 0), 0), R)
    m = block // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        x_at = x_ptr + row.to(tl.int64)[:, None] * stride_x + m[None, :]
        y_at = y_ptr + row.to(tl.int64)[:, None] * stride_y + n[None, :]
        left = tl.load(x_at, mask=(row < end)[:, None] & (m < DEPTH)[None, :], other=0.0)
        right = tl.load(y_at, mask=(row < end)[:, None] & (n < SIZE)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    matrix = out_ptr + group.to(tl.int64) * stride_e
    at = matrix + m.to(tl.int64)[:, None] * stride_m + n.to(tl.int64)[None, :] * stride_n
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(m < DEPTH)[:, None] & (n < SIZE)[None, :])
