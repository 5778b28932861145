"""fp32 products by oneDNN, in sums that are short enough for fp32."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from pypar.ops.linear.library import from_product, no_gain

# oneDNN adds up to 1024 terms, and more, in one chain, whose error grows with its length: at 1024 terms it is 2.5
# times MKL's and twice OpenBLAS's, which add 128 to 384 before they begin another. A sum is cut into pieces of at most
# so many terms, which costs one addition for each result and piece, and copies of operands that lie row by row.
_MAX_TERMS = 512


def missing() -> str | None:
    """Why this machine or this torch has no such product."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"oneDNN's fp32 product was only measured on x86-64, and this is {platform.machine()}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN"
    return None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b.T [K, O] + bias."""
    pieces = -(-a.shape[1] // _MAX_TERMS)
    if pieces == 1:
        return _chain(a, b, bias)
    parts = zip(a.tensor_split(pieces, 1), b.tensor_split(pieces, 1), strict=True)
    out = _chain(*next(parts), bias)
    for part in parts:
        out += _chain(*part)
    return out


def _chain(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")


def _dense(a: Tensor) -> Tensor:
    """oneDNN reads a matrix or its transpose as they are; other strides take it a hundred times as long."""
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


def _unsupported(x: Tensor, in_features: int, out_features: int) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, and oneDNN computes on CPU"
    if x.dtype != torch.float32:
        return f"x is {x.dtype}; only float32 gains"
    return no_gain(x, in_features, out_features)


_MISSING = missing()
ONEDNN = from_product("onednn", _product, _unsupported)
