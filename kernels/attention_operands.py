"""The arguments that attention's kernels share, from a problem of pypar.ops.attention (read here, not imported)."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attention_configurations import Tile

UNBOUNDED = 2**30  # bounds of positions; sums of two fit an int32
LOG2E = 1.4426950408889634


class Sizes(NamedTuple):
    """B sequences; T, S: their lengths, or those of all sequences together."""

    B: int
    T: int
    S: int
    N: int
    G: int
    H: int
    Hv: int
    varlen: bool


def sizes(problem: Any) -> Sizes:
    varlen = problem.cu_seqlens_q is not None
    B = problem.cu_seqlens_q.shape[0] - 1 if varlen else problem.q.shape[0]
    (T, N, H), (S, G, Hv) = problem.q.shape[-3:], problem.v.shape[-3:]
    return Sizes(B, T, S, N, G, H, Hv, varlen)


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def is_plain(problem: Any) -> bool:
    """Nothing but a positive scale stands between products and softmax: one FMA instead of two operations.
    Not in fp32,
    where it costs accuracy of large logits and the products take the time."""
    added = problem.bias is not None or problem.alibi_slopes is not None
    return problem.scale > 0 and problem.softcap == 0 and not added and problem.q.dtype != torch.float32


def strides_of(name: str, x: Tensor, letters: str) -> dict[str, int]:
    """stride_<name><letter> of x [B, ...]; of a varlen x [...] the batch stride is 0."""
    strides = x.stride() if x.dim() == 4 else (0, *x.stride())
    return {f"stride_{name}{letter}": stride for letter, stride in zip(letters, strides, strict=True)}


def operands(problem: Any) -> dict[str, Any]:
    size = sizes(problem)
    bias, slopes = problem.bias, problem.alibi_slopes
    bias_strides = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = bias.expand(size.B, size.N, size.T, size.S).stride()
    return {
        "q_ptr": problem.q,
        "k_ptr": problem.k,
        "v_ptr": problem.v,
        "bias_ptr": bias,
        "slopes_ptr": slopes,
        "seed_ptr": problem.seed if problem.dropout_p else None,
        "cu_q_ptr": problem.cu_seqlens_q,
        "cu_k_ptr": problem.cu_seqlens_k,
        **strides_of("q", problem.q, "btnh"),
        **strides_of("k", problem.k, "bsgh"),
        **strides_of("v", problem.v, "bsgh"),
        **{f"stride_b{letter}": stride for letter, stride in zip("bnts", bias_strides, strict=True)},
        "stride_slope": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
    }


def options(problem: Any, tile: Tile) -> dict[str, Any]:
    size, positions = sizes(problem), problem.positions
    bottom_right = positions is None
    q_start, k_start, step = (
        (0, 0, 1) if bottom_right else (positions.q_start, positions.k_start, positions.step)
    )
    distance = q_start - k_start
    low = -((problem.left - distance) // step)  # ceil((distance - left) / step)
    high = (distance + problem.right) // step
    softcap = float(problem.softcap)
    unit = 1.0 if problem.q.dtype == torch.float32 else LOG2E  # as in attention_tiles.unit
    return {
        "B": size.B,
        "T": size.T,
        "S": size.S,
        "N": size.N,
        "scale": problem.scale / softcap if softcap else problem.scale * unit,
        "cap": softcap * unit,
        "left_bound": min(max(low, -UNBOUNDED), UNBOUNDED),
        "right_bound": min(max(high, -UNBOUNDED), UNBOUNDED),
        "q_start": q_start,
        "k_start": k_start,
        "step": step,
        "batch_start": 0 if positions is None else positions.batch_start,
        "head_start": 0 if positions is None else positions.head_start,
        "dropout_threshold": _signed(math.floor(problem.dropout_p * 2**32)),
        "dropout_scale": 1 / (1 - problem.dropout_p),
        "H": size.H,
        "HV": size.Hv,
        "BLOCK_H": padded(size.H),
        "BLOCK_HV": padded(size.Hv),
        "BLOCK_T": tile.BLOCK_T,
        "BLOCK_S": tile.BLOCK_S,
        "SOFTCAP": softcap != 0,
        "HAS_LEFT": problem.left != -1,
        "HAS_RIGHT": problem.right != -1,
        "BOTTOM_RIGHT": bottom_right,
    }


def _signed(number: int) -> int:
    """The int32 with the bits of this uint32."""
    return number - 2**32 if number >= 2**31 else number
