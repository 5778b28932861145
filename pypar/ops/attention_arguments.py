"""What attention accepts: every refusal is a ValueError that names the argument."""

from __future__ import annotations

import math

from torch import Tensor

from pypar.ops.rows import accumulate_dtype


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} {tuple(x.shape)} must be [batch, positions, heads, head size]; unsqueeze it"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; convert them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q is on {q.device}; move them to one device")
    B, _, N, H = q.shape
    _, S, G, _ = k.shape
    if k.shape[0] != B or k.shape[3] != H or H == 0:
        raise ValueError(
            f"k {tuple(k.shape)} must have q's batch ({B}) and q's head size ({H}), which must not be 0; "
            f"pass k of shape [{B}, S, G, {H}]"
        )
    if v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(
            f"v {tuple(v.shape)} must have one vector per key of k {tuple(k.shape)}; "
            f"pass v of shape [{B}, {S}, {G}, Hv] with Hv > 0"
        )
    if G == 0 or N == 0 or N % G != 0:
        raise ValueError(
            f"q's number of heads ({N}) must be a positive multiple of k's ({G}): whole groups of query "
            "heads share a key/value head; pass k and v with a number of heads that divides it"
        )


def check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[3] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(
            f"scale ({scale}) must be finite; None gives 1 / sqrt(H), here {q.shape[3] ** -0.5:.4g}"
        )
    return float(scale)


Results = dict[str, Tensor | None]


def check_results(q: Tensor, v: Tensor, outs: Results, lses: Results) -> None:
    B, T, N, _ = q.shape
    for name, x in (outs | lses).items():
        shape, dtype = ((B, T, N, v.shape[3]), q.dtype) if name in outs else ((B, N, T), accumulate_dtype(q))
        if x is None:
            continue
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must be {shape} {dtype} on {q.device}; "
                "pass what attention_forward returned, or its gradient"
            )
