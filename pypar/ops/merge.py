"""Combining partial attentions over different keys, as ring attention does (Liu et al., arXiv 2310.01889)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.ops.backend import Backend, choose
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype


def merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The attention over the keys of a and b together, from the two attentions of the same queries.

    out_a, out_b: [B, T, N, Hv] of one dtype; lse_a, lse_b: [B, N, T] fp32, natural log of the sum of
    exponentials (-inf: no key was seen). Returns (out [B, T, N, Hv] of that dtype, lse [B, N, T] fp32),
    differentiable; computed in fp32. A row that saw no key on either side gives 0 and lse -inf. ValueError:
    shapes or dtypes that do not fit, a backend that refuses.
    """
    if out_a.dim() != 4 or out_b.shape != out_a.shape or out_b.dtype != out_a.dtype:
        raise ValueError(
            f"out_b {tuple(out_b.shape)} {out_b.dtype} must match out_a {tuple(out_a.shape)} {out_a.dtype}, "
            f"both [B, T, N, Hv]; pass two attentions of the same queries"
        )
    expected = (out_a.shape[0], out_a.shape[2], out_a.shape[1])
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != expected or lse.dtype != accumulate_dtype(lse):
            raise ValueError(
                f"{name} {tuple(lse.shape)} {lse.dtype} must be [B, N, T] = {expected} in float32; "
                f"pass the lse that attention returned"
            )
    args = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    chosen = choose("merge", BACKENDS, args, backend)
    return _forward(out_a, lse_a, out_b, lse_b, chosen.name)


def _share(part: Tensor, other: Tensor) -> Tensor:
    """exp(part) / (exp(part) + exp(other)) as [B, T, N, 1]; 0 where neither part saw a key."""
    share_BNT = torch.where(torch.isneginf(part), 0.0, torch.sigmoid(part - other))
    return share_BNT.transpose(1, 2).unsqueeze(-1)


def reference_forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition."""
    dtype = accumulate_dtype(out_a)
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a.to(dtype) * _share(lse_a, lse_b) + out_b.to(dtype) * _share(lse_b, lse_a)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def reference_backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With s the share of a part: d(part) = s * dout, d(lse of part) = s * (dlse + <dout, part - merged>)."""
    dtype = accumulate_dtype(out_a)
    share_a, share_b = _share(lse_a, lse_b), _share(lse_b, lse_a)
    wide_dout, wide_a, wide_b = dout.to(dtype), out_a.to(dtype), out_b.to(dtype)
    slope = (wide_dout * (wide_a - wide_b)).sum(-1, keepdim=True) * share_a * share_b
    dlse_BTN1 = dlse.transpose(1, 2).unsqueeze(-1)
    gradients = []
    for part, share, sign in ((out_a, share_a, 1), (out_b, share_b, -1)):
        gradients.append((wide_dout * share).to(part.dtype).contiguous())
        gradients.append((share * dlse_BTN1 + sign * slope).squeeze(-1).transpose(1, 2).contiguous())
    return gradients[0], gradients[1].to(lse_a.dtype), gradients[2], gradients[3].to(lse_b.dtype)


def _always(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str | None:
    return None


BACKENDS = (Backend("reference", reference_forward, reference_backward, _always),)


def _fake_forward(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _fake_backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        out_a.new_empty(out_a.shape),
        lse_a.new_empty(lse_a.shape),
        out_b.new_empty(out_b.shape),
        lse_b.new_empty(lse_b.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *parts, ctx.backend = inputs
    ctx.save_for_backward(*parts)


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, dlse, *ctx.saved_tensors, ctx.backend), None


_forward = register(
    "merge",
    "forward",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_forward,
)
_backward = register(
    "merge",
    "backward",
    "(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    BACKENDS,
    _fake_backward,
)
register_gradient("merge", _gradient, _save)
