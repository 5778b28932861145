"""Rotary position embedding (Su et al., arXiv 2104.09864), in the layout of Hugging Face's Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype, native_refusal


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Turns each pair (x[..., i], x[..., i + H/2]) by the angle of its position; computed in fp32.

    x: [B, T, N, H], H even, any strides; cos, sin: [T, H/2] float32, the rows being those of the caller's T
    positions. Returns [B, T, N, H] of x's dtype, contiguous. No gradient flows to cos and sin. ValueError:
    shapes that do not fit, cos or sin that are not float32 (or float64 for a float64 x), a backend that
    refuses.
    """
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(
            f"x {tuple(x.shape)} must be [B, T, N, H] with an even H; reshape it, or choose an even head size"
        )
    expected = (x.shape[1], x.shape[3] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != expected:
            raise ValueError(
                f"{name} {tuple(table.shape)} must be [T, H/2] = {expected}; take the rows of x's positions"
            )
        if table.dtype not in (torch.float32, accumulate_dtype(x)):
            raise ValueError(
                f"{name} is {table.dtype} and must be float32, as angles need; convert with {name}.float()"
            )
    chosen = choose("rope", BACKENDS, {"x": x, "cos": cos, "sin": sin}, backend)
    return _forward(x, cos, sin, chosen.name)


def reference_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition: (a, b) -> (a cos - b sin, b cos + a sin)."""
    dtype = accumulate_dtype(x)
    a, b = x.to(dtype).chunk(2, dim=-1)
    cos_T1H, sin_T1H = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    out = torch.cat((a * cos_T1H - b * sin_T1H, b * cos_T1H + a * sin_T1H), dim=-1)
    return out.to(x.dtype).contiguous()


def reference_backward(dout: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of a rotation turns back."""
    return reference_forward(dout, cos, -sin)


def _native_unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return native_refusal(x, cos, sin)


def _native_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _native_turn(x, cos, sin, 1.0)


def _native_backward(dout: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _native_turn(dout, cos, sin, -1.0)


def _native_turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    native.run(
        native.module().rope,
        x, cos, sin, out,
        x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, x.stride(0), x.stride(1), x.stride(2), direction,
        native.dtype_code(x), native.num_threads(),
    )  # fmt: skip
    return out


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _backward(dout, cos, sin, ctx.backend), None, None, None


_forward = register(
    "rope", "forward", "(Tensor x, Tensor cos, Tensor sin, str backend) -> Tensor", BACKENDS, _fake
)
_backward = register(
    "rope", "backward", "(Tensor dout, Tensor cos, Tensor sin, str backend) -> Tensor", BACKENDS, _fake
)
register_gradient("rope", _gradient, _save)
