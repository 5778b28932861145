"""The definition of rms_norm and layer_norm, which differ in that the rows of layer_norm are centered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype


class NormInputs(NamedTuple):
    """What forward takes, and the operator pypar::<op>_forward in this order; see `rms_norm` and `layer_norm`."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    weight_offset: float


class NormOutputs(NamedTuple):
    """What forward gives.

    total is x + residual, empty where there is no residual; mean and rstd are of each row, mean empty where rows are
    not centered.
    """

    out: Tensor
    total: Tensor
    mean: Tensor
    rstd: Tensor


class NormSaved(NamedTuple):
    """What backward takes, and the operator pypar::<op>_backward in this order.

    x is what was normalised, the sum if there was one. dsum, the gradient of the sum, is added to dx, which is the
    residual's gradient too.
    """

    dout: Tensor
    dsum: Tensor | None
    x: Tensor
    weight: Tensor | None
    has_bias: bool
    mean: Tensor
    rstd: Tensor
    weight_offset: float


class NormGradients(NamedTuple):
    """What backward gives: the last two in the dtype of rstd, and empty without weight or bias."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor


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


def reference_forward(given: NormInputs, center: bool) -> NormOutputs:
    """The definition, with statistics in fp32, or fp64 for fp64."""
    x = given.x
    total = x.new_empty(0)
    if given.residual is not None:
        x = total = (x + given.residual).contiguous()
    wide = x.to(accumulate_dtype(x))
    mean = wide.new_empty(0)
    if center:
        mean = wide.mean(-1)
        wide = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(wide.square().mean(-1) + given.eps)
    out = wide * rstd.unsqueeze(-1)
    if given.weight is not None:
        out = out * (given.weight.to(wide.dtype) + given.weight_offset)
    if given.bias is not None:
        out = out + given.bias.to(wide.dtype)
    return NormOutputs(out.to(x.dtype).contiguous(), total, mean.contiguous(), rstd.contiguous())


def reference_backward(saved: NormSaved, center: bool) -> NormGradients:
    """With y = (x - mean) rstd and g = dout weight: dx = rstd (g - mean(g) - y mean(g y)) + dsum, where mean(g) is
    there for centered rows only; dweight = sum(dout y) and dbias = sum(dout) over the rows."""
    x, weight, rstd = saved.x, saved.weight, saved.rstd
    wide_dout, y = saved.dout.to(rstd.dtype), x.to(rstd.dtype)
    if center:
        y = y - saved.mean.unsqueeze(-1)
    y = y * rstd.unsqueeze(-1)
    g = wide_dout if weight is None else wide_dout * (weight.to(rstd.dtype) + saved.weight_offset)
    dx = g - y * (g * y).mean(-1, keepdim=True)
    if center:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd.unsqueeze(-1)
    if saved.dsum is not None:
        dx = dx + saved.dsum.to(rstd.dtype)
    rows = tuple(range(x.dim() - 1))
    dweight = rstd.new_empty(0) if weight is None else _sum(wide_dout * y, rows)
    dbias = _sum(wide_dout, rows) if saved.has_bias else rstd.new_empty(0)
    return NormGradients(dx.to(x.dtype).contiguous(), dweight, dbias)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x.clone()  # torch takes () for all dimensions
