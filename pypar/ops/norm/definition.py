"""The definition of rms_norm and layer_norm, which differ in that the rows of layer_norm are centered.

forward(x, residual, weight, bias, eps, weight_offset) gives (out, x + residual, mean, rstd): the sum is empty where
there is no residual, the mean where rows are not centered. backward(dout, dsum, x, weight, has_bias, mean, rstd,
weight_offset), where x is the sum if there was one, gives (dx, dweight, dbias), the last two in the dtype of rstd and
empty without weight or bias. dsum, the gradient of the sum, is added to dx, which is the residual's gradient too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype

Forward = tuple[Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor]


def check(x: Tensor, residual: Tensor | None, eps: float, **vectors: Tensor | None) -> None:
    """ValueError for operands that do not fit together. vectors: weight, bias."""
    if x.dim() < 1:
        raise ValueError("x has no dimension to normalise; pass [..., D]")
    for name, value in vectors.items():
        if value is None:
            continue
        if value.dim() != 1 or value.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{name} {tuple(value.shape)} must be one value per element of x's last dimension, "
                f"and x is {tuple(x.shape)}; pass {name} of shape {tuple(x.shape[-1:])}"
            )
        if value.dtype != x.dtype and value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype} and must be {x.dtype} like x, or float32; convert it")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} must be like x {tuple(x.shape)} {x.dtype}; "
            "expand or convert it"
        )
    if not eps > 0:
        raise ValueError(
            f"eps ({eps}) must be positive, or a row of zeros divides by zero; use for example 1e-5"
        )


def reference_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    center: bool,
) -> Forward:
    """The definition, with statistics in fp32, or fp64 for fp64."""
    total = x.new_empty(0)
    if residual is not None:
        x = total = (x + residual).contiguous()
    wide = x.to(accumulate_dtype(x))
    mean = wide.new_empty(0)
    if center:
        mean = wide.mean(-1)
        wide = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    out = wide * rstd.unsqueeze(-1)
    if weight is not None:
        out = out * (weight.to(wide.dtype) + weight_offset)
    if bias is not None:
        out = out + bias.to(wide.dtype)
    return out.to(x.dtype).contiguous(), total, mean.contiguous(), rstd.contiguous()


def reference_backward(
    dout: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    center: bool,
) -> Backward:
    """With y = (x - mean) rstd and g = dout weight: dx = rstd (g - mean(g) - y mean(g y)) + dsum, where mean(g) is
    there for centered rows only; dweight = sum(dout y) and dbias = sum(dout) over the rows."""
    wide_dout, y = dout.to(rstd.dtype), x.to(rstd.dtype)
    if center:
        y = y - mean.unsqueeze(-1)
    y = y * rstd.unsqueeze(-1)
    g = wide_dout if weight is None else wide_dout * (weight.to(rstd.dtype) + weight_offset)
    dx = g - y * (g * y).mean(-1, keepdim=True)
    if center:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd.unsqueeze(-1)
    if dsum is not None:
        dx = dx + dsum.to(rstd.dtype)
    rows = tuple(range(x.dim() - 1))
    dweight = rstd.new_empty(0) if weight is None else _sum(wide_dout * y, rows)
    dbias = _sum(wide_dout, rows) if has_bias else rstd.new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight, dbias


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x.clone()  # torch takes () for all dimensions
