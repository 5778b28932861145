"""Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype, as_rows, native_refusal

# The gradient of weight is summed in blocks of rows, whose number does not depend on the number of threads:
# enough blocks for the threads of a large machine and for short, exact chains, and enough rows in each that
# adding the blocks up costs little.
_MAX_BLOCKS = 256
_MIN_BLOCK_ROWS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2, last dim) + eps) * weight, computed in fp32 and rounded once.

    x: [..., D], any strides; weight: [D], of x's dtype or float32. Returns [..., D] of x's dtype, contiguous.
    ValueError: weight that is not [D], eps that is not positive, a backend that refuses.
    """
    if weight.dim() != 1 or x.dim() < 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} must be one value per element of x's last dimension, "
            f"and x is {tuple(x.shape)}; pass weight of shape {tuple(x.shape[-1:])}"
        )
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise ValueError(f"weight is {weight.dtype} and must be {x.dtype} like x, or float32; convert it")
    if not eps > 0:
        raise ValueError(
            f"eps ({eps}) must be positive, or a row of zeros divides by zero; use for example 1e-5"
        )
    chosen = choose("rms_norm", BACKENDS, {"x": x, "weight": weight}, backend)
    return _forward(x, weight, eps, chosen.name)[0]


def reference_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition. Returns (out [..., D], 1 / root mean square [...], fp32 unless x is fp64)."""
    wide = x.to(accumulate_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    out = wide * rstd.unsqueeze(-1) * weight.to(wide.dtype)
    return out.to(x.dtype).contiguous(), rstd.contiguous()


def reference_backward(dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """With y = x * rstd and g = dout * weight: dx = rstd * (g - y * mean(g * y)), dweight = sum(dout * y)."""
    wide_dout = dout.to(rstd.dtype)
    normed = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    g = wide_dout * weight.to(rstd.dtype)
    dx = rstd.unsqueeze(-1) * (g - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (wide_dout * normed).flatten(0, -2).sum(0) if x.dim() > 1 else wide_dout * normed
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype).contiguous()


def _native_unsupported(x: Tensor, weight: Tensor) -> str | None:
    return native_refusal(x, weight)


def _native_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    wide_weight = weight.float().contiguous()
    native.run(
        native.module().rms_norm_forward,
        rows, wide_weight, out, rstd,
        rows.shape[0], rows.shape[1], rows.stride(0), eps, native.dtype_code(x), native.num_threads(),
    )  # fmt: skip
    return out, rstd


def _native_backward(dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows, dout_rows = as_rows(x), as_rows(dout)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight = torch.empty(weight.shape, dtype=torch.float32)
    wide_weight = weight.float().contiguous()
    num_rows, size = rows.shape
    rows_per_block = max(_MIN_BLOCK_ROWS, -(-num_rows // _MAX_BLOCKS))
    partial = torch.empty(-(-num_rows // rows_per_block), size, dtype=torch.float32)
    native.run(
        native.module().rms_norm_backward,
        dout_rows, rows, wide_weight, rstd,
        dx, dweight, partial, num_rows, size,
        dout_rows.stride(0), rows.stride(0), rows_per_block, native.dtype_code(x), native.num_threads(),
    )  # fmt: skip
    return dx, dweight.to(weight.dtype)


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)


def _fake_forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))


def _fake_backward(
    dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradient(ctx: Any, dout: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _backward(dout, x, weight, rstd, ctx.backend)
    return dx, dweight, None, None


_forward = register(
    "rms_norm",
    "forward",
    "(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_forward,
)
_backward = register(
    "rms_norm",
    "backward",
    "(Tensor dout, Tensor x, Tensor weight, Tensor rstd, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_backward,
)
register_gradient("rms_norm", _gradient, _save)
