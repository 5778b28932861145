"""linear_cross_entropy's logits in Triton, between its products: what softmax needs of a row, and the row's gradient.

A program goes along one row of logits in fp32, once for the one and once for the other. The gradient takes the place of
the logits; rounded to 16 bits, it fills the first half of its row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import tanh
from .launch import Launch, run_launches
from .rows import load_rows, store_rows

_LARGEST_BLOCK = 4096  # logits that a program holds at a time: 8 for each of 512 threads


def statistics(block: Any, state: Tensor, needs_sum: bool) -> None:
    """Applies bias and softcap to a block's logits [n, V], fp32, in place, and writes state [4, n].

    block: a Block of pypar.ops.linear_cross_entropy.rows (read here, not imported). state: of each row the greatest
    logit, the sum of exponentials, the target's logit and, where needs_sum, the sum of the logits.
    """
    arguments = {"state_ptr": state, "n": len(block.logits), "NEEDS_SUM": needs_sum}
    run_launches([_row_launch(_statistics_kernel, block, arguments)], block.logits)


def gradient(
    block: Any, coefficients: tuple[Tensor, Tensor, Tensor, Tensor | None], is_raw: bool, dtype: torch.dtype
) -> Tensor:
    """The gradient of the products [n, V] in `dtype`, in the memory of the block's logits.

    coefficients: maximum, share, target_share and each of pypar.ops.linear_cross_entropy.rows, [n] fp32.
    """
    out = block.logits.view(dtype)[:, : block.logits.shape[1]]
    names = ("maximum_ptr", "share_ptr", "target_share_ptr", "each_ptr")
    arguments: dict[str, Any] = dict(zip(names, coefficients, strict=True))
    arguments |= {"out_ptr": out, "stride_out": out.stride(0), "IS_RAW": is_raw}
    run_launches([_row_launch(_gradient_kernel, block, arguments)], block.logits)
    return out


def _row_launch(kernel: Any, block: Any, arguments: dict[str, Any]) -> Launch:
    n, V = block.logits.shape
    columns = min(triton.next_power_of_2(V), _LARGEST_BLOCK)
    shared = {"logits_ptr": block.logits, "bias_ptr": block.bias, "targets_ptr": block.targets, "V": V}
    shared |= {"softcap": block.softcap, "CAPS": bool(block.softcap), "BLOCK_V": columns}
    return Launch(kernel, n, shared | arguments, min(max(columns // 256, 1), 16), 1)


@triton.jit(do_not_specialize=["n"])
def _statistics_kernel(
    logits_ptr, bias_ptr, targets_ptr, state_ptr, n, V, softcap,
    CAPS: tl.constexpr,
    NEEDS_SUM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    target = tl.load(targets_ptr + row)[:, None]
    target = tl.where(target < V, target, -1)  # another part's
    most = tl.full((1,), float("-inf"), tl.float32)
    totals = tl.zeros((1, BLOCK_V), tl.float32)
    picked = tl.zeros((1, BLOCK_V), tl.float32)
    sums = tl.zeros((1, BLOCK_V), tl.float32)
    for first in range(0, V, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = (column < V)[None, :]
        x = load_rows(logits_ptr, row, V, column, inside, float("-inf"))
        if bias_ptr is not None or CAPS:
            x = _finished(x, bias_ptr, column, inside, softcap, CAPS)
            store_rows(logits_ptr, row, V, column, inside, x)
            x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(most, tl.max(x, 1))
        reference = tl.where(new == float("-inf"), 0.0, new)[:, None]
        totals = totals * tl.exp(most[:, None] - reference) + tl.exp(x - reference)
        picked = tl.where(column[None, :] == target, x, picked)
        if NEEDS_SUM:
            sums += tl.where(inside, x, 0.0)
        most = new
    tl.store(state_ptr + row, tl.where(most == float("-inf"), 0.0, most))
    tl.store(state_ptr + n + row, tl.sum(totals, 1))
    tl.store(state_ptr + 2 * n + row, tl.sum(picked, 1))
    if NEEDS_SUM:
        tl.store(state_ptr + 3 * n + row, tl.sum(sums, 1))


@triton.jit
def _gradient_kernel(
    logits_ptr, bias_ptr, targets_ptr, maximum_ptr, share_ptr, target_share_ptr, each_ptr, out_ptr, V, stride_out,
    softcap,
    CAPS: tl.constexpr,
    IS_RAW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """share * exp(logit - maximum) + each, and target_share more at the target, times the softcap's derivative."""
    row = tl.program_id(0) + tl.arange(0, 1)
    target = tl.load(targets_ptr + row)[:, None]
    maximum = tl.load(maximum_ptr + row)[:, None]
    share = tl.load(share_ptr + row)[:, None]
    target_share = tl.load(target_share_ptr + row)[:, None]
    for first in range(0, V, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = (column < V)[None, :]
        x = load_rows(logits_ptr, row, V, column, inside)
        if IS_RAW:
            x = _finished(x, bias_ptr, column, inside, softcap, CAPS)
        slope = tl.exp(x - maximum) * share
        if each_ptr is not None:
            slope += tl.load(each_ptr + row)[:, None]
        slope += tl.where(column[None, :] == target, target_share, 0.0)
        if CAPS:
            ratio = x / softcap
            slope *= 1.0 - ratio * ratio
        # Narrower, the first block's gradient lies where other threads read its logits. Later ones lie before theirs.
        tl.debug_barrier()
        store_rows(out_ptr, row, stride_out, column, inside, slope)


@triton.jit
def _finished(x, bias_ptr, column, inside, softcap, CAPS: tl.constexpr):
    """Products with bias and softcap."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column[None, :], mask=inside, other=0.0)
    if CAPS:
        x = softcap * tanh(x / softcap, True)
    return x
