"""merge_attention in Triton: a program holds the rows of its tile of one part after the other.

Forward takes the parts as online softmax takes keys, so that each is read once; backward reads the parts once, with
dout . out from the row's shares and products, which it holds.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches
from .rows import row_tile


def forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of outs [P, (B,) T, N, H] and lses [P, (B,) N, T], contiguous."""
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    tensors = {"outs_ptr": outs, "lses_ptr": lses, "out_ptr": out, "lse_ptr": lse}
    run_launches([_launch(_merge_forward_kernel, outs, tensors)], outs)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(douts, dlses), contiguous as all arguments are."""
    douts, dlses = outs.new_empty(outs.shape), lses.new_empty(lses.shape)
    tensors = {
        "dout_ptr": dout,
        "dlse_ptr": dlse,
        "outs_ptr": outs,
        "lses_ptr": lses,
        "lse_ptr": lse,
        "douts_ptr": douts,
        "dlses_ptr": dlses,
    }
    run_launches([_launch(_merge_backward_kernel, outs, tensors)], outs)
    return douts, dlses


def _launch(kernel: Any, outs: Tensor, tensors: dict[str, Any]) -> Launch:
    P, *batch, T, N, H = outs.shape
    tile = row_tile(H)
    rows = T * N * (batch[0] if batch else 1)
    sizes = {"rows": rows, "T": T, "N": N, "P": P, "H": H}
    blocks = {"BLOCK_ROWS": tile.BLOCK_ROWS, "BLOCK_H": tile.BLOCK_D}
    # Twice row_tile's: backward holds two tiles, which do not always fit the registers of fewer threads.
    num_warps = min(2 * tile.num_warps, 32)
    return Launch(kernel, triton.cdiv(rows, tile.BLOCK_ROWS), tensors | sizes | blocks, num_warps, 1)


@triton.jit
def _places(rows, T, N, BLOCK_ROWS: tl.constexpr):
    """(row, its place in lse [B, N, T])."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return row, (row // N // T * N + row % N) * T + row // N % T


@triton.jit
def _load_part(outs_ptr, lses_ptr, part, rows, row, place, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """(out [BLOCK_ROWS, BLOCK_H] in fp32, lse) of a part; 0 where it saw nothing."""
    lse = tl.load(lses_ptr + rows.to(tl.int64) * part + place, mask=row < rows, other=float("-inf"))
    h = tl.arange(0, BLOCK_H)
    seen = ((row < rows) & (lse != float("-inf")))[:, None] & (h < H)[None, :]
    at = outs_ptr + (rows.to(tl.int64) * part + row)[:, None] * H + h[None, :]
    return tl.load(at, mask=seen, other=0.0).to(tl.float32), lse


@triton.jit(do_not_specialize=["rows", "T", "N", "P"])
def _merge_forward_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, rows, T, N, P,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    row, place = _places(rows, T, N, BLOCK_ROWS)
    h = tl.arange(0, BLOCK_H)
    most = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    out = tl.zeros((BLOCK_ROWS, BLOCK_H), tl.float32)
    for part in range(0, P):
        found, lse = _load_part(outs_ptr, lses_ptr, part, rows, row, place, H, BLOCK_H)
        new = tl.maximum(most, lse)
        reference = tl.where(new == float("-inf"), 0.0, new)
        old, share = tl.exp(most - reference), tl.exp(lse - reference)
        total = total * old + share
        out = out * old[:, None] + found * share[:, None]
        most = new
    nothing = most == float("-inf")
    total = tl.where(nothing, 1.0, total)
    tl.store(lse_ptr + place, tl.where(nothing, float("-inf"), most + tl.log(total)), mask=row < rows)
    at = out_ptr + row[:, None] * H + h[None, :]
    inside = (row < rows)[:, None] & (h < H)[None, :]
    tl.store(at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "T", "N", "P"])
def _merge_backward_kernel(
    dout_ptr, dlse_ptr, outs_ptr, lses_ptr, lse_ptr, douts_ptr, dlses_ptr, rows, T, N, P,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dlses first holds the products of dout and the parts' outs, from which their mean is taken off at the end."""
    row, place = _places(rows, T, N, BLOCK_ROWS)
    h = tl.arange(0, BLOCK_H)
    inside = (row < rows)[:, None] & (h < H)[None, :]
    merged = tl.load(lse_ptr + place, mask=row < rows, other=0.0)
    merged = tl.where(merged == float("-inf"), 0.0, merged)
    dout = tl.load(dout_ptr + row[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_ROWS,), tl.float32)
    for part in range(0, P):
        found, lse = _load_part(outs_ptr, lses_ptr, part, rows, row, place, H, BLOCK_H)
        share = tl.exp(lse - merged)
        product = tl.sum(found * dout, 1)
        mean += share * product
        first = rows.to(tl.int64) * part
        tl.store(dlses_ptr + first + place, product, mask=row < rows)
        at = douts_ptr + (first + row)[:, None] * H + h[None, :]
        tl.store(at, (dout * share[:, None]).to(douts_ptr.dtype.element_ty), mask=inside)
    left = -mean
    if dlse_ptr is not None:
        left += tl.load(dlse_ptr + place, mask=row < rows, other=0.0)
    tl.debug_barrier()  # the products are read by the threads that hold the rows, which may be others
    for part in range(0, P):
        at = rows.to(tl.int64) * part + place
        share = tl.exp(tl.load(lses_ptr + at, mask=row < rows, other=float("-inf")) - merged)
        product = tl.load(dlses_ptr + at, mask=row < rows, other=0.0)
        tl.store(dlses_ptr + at, share * (product + left), mask=row < rows)
