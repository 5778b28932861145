"""Tokens to the rows of the experts that they chose, and back: what a mixture of experts does around its experts.

A choice is a pair (token, number of the choice). Rows stand in the order of experts and, within one expert, in the
order of choices: a stable counting sort, which gives the same rows on every device and for any number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pypar.ops.backend import choose
from pypar.ops.moe_permute.backends import BACKENDS
from pypar.ops.moe_permute.operator import combine_forward, forward, order

__all__ = ["BACKENDS", "Permuted", "moe_combine", "moe_permute"]


class Permuted(NamedTuple):
    """Tokens in the order of experts, and where each came from.

    rows: [T k, D]; the first counts[0] are expert 0's, the next counts[1] expert 1's, and so on. Choices without an
          expert come last: rows of zeros, past sum(counts).
    counts: [E] int64, the rows of each expert; 0 where nobody chose it. Of ranks that hold neighbouring experts they
          add up to what is sent to each.
    places: [T, k] int64, the row of each choice; of one without an expert -1 - row. For `moe_combine`.
    sources: [T k] int64, the inverse: the choice t k + j of each row, so that sources // k is its token.
    """

    rows: Tensor
    counts: Tensor
    places: Tensor
    sources: Tensor


def moe_permute(x: Tensor, experts: Tensor, num_experts: int, *, backend: str | None = None) -> Permuted:
    """Each token as many times as it chose an expert, in the order of experts.

    x: [T, D], any strides; experts: [T, k] int64 in [0, E), or -1: no expert takes that choice (capacity, or what
    another rank computes); E = num_experts. Differentiable in x: a token's gradient is the sum of its rows', in fp32
    and in the order of its choices. Sizes of results depend on sizes alone: nothing waits for a GPU.
    ValueError: shapes that do not fit, experts that are not int64, on CPU an expert out of range (on a GPU it counts
    as -1), a backend that refuses.
    """
    if x.dim() != 2 or experts.dim() != 2 or len(x) != len(experts):
        raise ValueError(
            f"x {tuple(x.shape)} must be [T, D] and experts {tuple(experts.shape)} [T, k], with one T; flatten the "
            "dimensions of batch and sequence"
        )
    if experts.dtype != torch.int64:
        raise ValueError(f"experts is {experts.dtype} and must be int64; convert with experts.long()")
    if num_experts < 1:
        raise ValueError(f"num_experts ({num_experts}) must be positive")
    chosen = choose("moe_permute", BACKENDS, {"x": x, "experts": experts}, backend).name
    counts, places, sources = order(experts, num_experts, chosen)
    return Permuted(forward(x, places, chosen), counts, places, sources)


def moe_combine(
    rows: Tensor, places: Tensor, weights: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """The sum of each token's rows times their weights: the way back from `moe_permute`.

    rows: [T k, D], any strides; places: [T, k] int64, of moe_permute; weights: [T, k], of rows' dtype or float32, or
    None for ones. Returns [T, D] of rows' dtype, computed in fp32 in the order of choices. Choices without an expert
    add nothing: their rows are not read, and their gradients, and those of their weights, are zero.
    ValueError: shapes or dtypes that do not fit, on CPU places that do not name each row once, a backend that refuses.
    """
    if rows.dim() != 2 or places.dim() != 2 or places.dtype != torch.int64 or len(rows) != places.numel():
        raise ValueError(
            f"rows {tuple(rows.shape)} must be [T k, D] and places {tuple(places.shape)} {places.dtype} [T, k] int64, "
            "one row for each choice; pass the places that moe_permute returned"
        )
    if weights is not None and (
        weights.shape != places.shape or weights.dtype not in (rows.dtype, torch.float32)
    ):
        raise ValueError(
            f"weights {tuple(weights.shape)} {weights.dtype} must be {tuple(places.shape)}, as places, of "
            f"{rows.dtype}, as rows, or float32"
        )
    tensors = {"x": rows, "places": places, "weights": weights}
    chosen = choose("moe_combine", BACKENDS, tensors, backend).name
    return combine_forward(rows, places, weights, chosen)
