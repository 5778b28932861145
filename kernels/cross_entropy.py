"""cross_entropy in Triton: a program goes along its rows once, with the greatest logit so far and the sum for it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches
from .rows import RowTile, load_rows, row_tile, store_rows

_LARGEST_BLOCK = 4096  # logits of a row that a program holds at a time


def forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, maximum, total) [R], fp32, of logits [R, V] with adjacent elements and targets [R]."""
    loss, maximum, total = (logits.new_empty(targets.numel(), dtype=torch.float32) for _ in range(3))
    tensors = {"loss_ptr": loss, "maximum_ptr": maximum, "total_ptr": total}
    run_launches([_launch(_forward_kernel, logits, targets, ignore_index, tensors, 1)], logits)
    return loss, maximum, total


def backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    """dlogits [R, V] of dloss [R], fp32, and what forward took and gave."""
    R, V = targets.numel(), logits.shape[1]
    dlogits = logits.new_empty(R, V)
    tensors = {"dloss_ptr": dloss, "maximum_ptr": maximum, "total_ptr": total, "dlogits_ptr": dlogits}
    blocks = triton.cdiv(V, _tile(logits).BLOCK_D)
    run_launches([_launch(_backward_kernel, logits, targets, ignore_index, tensors, blocks)], logits)
    return dlogits


def _tile(logits: Tensor) -> RowTile:
    return row_tile(min(logits.shape[1], _LARGEST_BLOCK))


def _launch(
    kernel: Any, logits: Tensor, targets: Tensor, ignore_index: int, tensors: dict[str, Tensor], blocks: int
) -> Launch:
    """A launch of so many programs for each tile of rows."""
    tile, R = _tile(logits), targets.numel()
    arguments: dict[str, Any] = {"logits_ptr": logits, "targets_ptr": targets, **tensors, "R": R}
    arguments |= {"V": logits.shape[1], "stride": logits.stride(0), "ignore_index": ignore_index}
    arguments |= {"BLOCK_ROWS": tile.BLOCK_ROWS, "BLOCK_V": tile.BLOCK_D}
    return Launch(kernel, triton.cdiv(R, tile.BLOCK_ROWS) * blocks, arguments, tile.num_warps, 1)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def _forward_kernel(
    logits_ptr, targets_ptr, loss_ptr, maximum_ptr, total_ptr, R, V, stride, ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, target, counts = _targets(targets_ptr, tl.program_id(0), R, ignore_index, BLOCK_ROWS)
    most = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
    picked = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
    end = tl.where(tl.max(counts.to(tl.int32), 0) > 0, V, 0)  # rows that do not count are not read
    for first in range(0, end, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = counts[:, None] & (column < V)[None, :]
        x = load_rows(logits_ptr, row, stride, column, inside, float("-inf"))
        new = tl.maximum(most, tl.max(x, 1))
        reference = tl.where(new == float("-inf"), 0.0, new)[:, None]
        totals = totals * tl.exp(most[:, None] - reference) + tl.exp(x - reference)
        picked = tl.where(column[None, :] == target[:, None], x, picked)
        most = new
    total = tl.where(counts, tl.sum(totals, 1), 1.0)
    most = tl.where(most == float("-inf"), 0.0, most)
    # The maximum is taken from the logit and not added to the logarithm, where it would swallow a small loss.
    loss = tl.where(counts, tl.log(total) - (tl.sum(picked, 1) - most), 0.0)
    tl.store(loss_ptr + row, loss, mask=row < R)
    tl.store(maximum_ptr + row, most, mask=row < R)
    tl.store(total_ptr + row, total, mask=row < R)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def _backward_kernel(
    dloss_ptr, logits_ptr, targets_ptr, maximum_ptr, total_ptr, dlogits_ptr, R, V, stride, ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(V, BLOCK_V)
    row, target, counts = _targets(targets_ptr, tl.program_id(0) // blocks, R, ignore_index, BLOCK_ROWS)
    column = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (column < V)[None, :]
    maximum = tl.load(maximum_ptr + row, mask=counts, other=0.0)
    share = 1.0 / tl.load(total_ptr + row, mask=counts, other=1.0)
    dloss = tl.load(dloss_ptr + row, mask=counts, other=0.0)
    x = load_rows(logits_ptr, row, stride, column, counts[:, None] & inside)
    probability = tl.exp(x - maximum[:, None]) * share[:, None]
    probability -= tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    dlogits = tl.where(counts[:, None], probability * dloss[:, None], 0.0)
    store_rows(dlogits_ptr, row, V, column, (row < R)[:, None] & inside, dlogits)


@triton.jit
def _targets(targets_ptr, block, R, ignore_index, BLOCK_ROWS: tl.constexpr):
    """(the block's rows, their targets, which of them count)."""
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    target = tl.load(targets_ptr + row, mask=row < R, other=0)
    return row, target, (row < R) & (target != ignore_index)
