"""Attention over parts of the keys, merged into attention over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype, native_refusal

Merged = tuple[Tensor, Tensor]


def merge_attention(outs: Tensor, lses: Tensor, *, backend: str | None = None) -> Merged:
    """(out, lse) of attention over all keys, from those over each part of the keys.

    lse = log(sum_p exp(lse_p)), out = sum_p exp(lse_p - lse) out_p, in fp32 and in the order of the parts.

    outs: [P, B, T, N, H] or [P, T, N, H], what `pypar.attention` returned for each part, stacked; lses: [P, B, N, T]
    or [P, N, T], beside them, fp32 (fp64 with fp64). Returns out [B, T, N, H] of outs' dtype and lse [B, N, T]. Where a
    row saw no key of a part, lse_p is -inf, and its out_p is not read; a row that saw none at all gives 0 and -inf.
    Both outputs have gradients, which are 0 where a row saw nothing. Source: Milakov and Gimelshein, arXiv 1805.02867.
    ValueError: shapes or dtypes that do not fit, a backend that refuses.
    """
    if outs.dim() not in (4, 5) or lses.shape != _lse_shape(outs.shape):
        raise ValueError(
            f"outs {tuple(outs.shape)} must be [P, B, T, N, H] or [P, T, N, H] and lses {tuple(lses.shape)} "
            "[P, B, N, T] or [P, N, T], as attention returns them for each part of the keys; torch.stack stacks them"
        )
    if not len(outs):
        raise ValueError("outs has no part; merge one part or more")
    if lses.dtype != accumulate_dtype(outs):
        raise ValueError(
            f"lses is {lses.dtype} and must be {accumulate_dtype(outs)}, as attention returns it"
        )
    chosen = choose("merge_attention", BACKENDS, {"outs": outs, "lses": lses}, backend)
    return _forward(outs, lses, chosen.name)


def reference_forward(outs: Tensor, lses: Tensor) -> Merged:
    """The definition."""
    lse = torch.logsumexp(lses, 0)
    shares = _shares(lses, lse)
    terms = torch.where(shares == 0, 0.0, outs.to(lse.dtype) * shares)
    return terms.sum(0).to(outs.dtype).contiguous(), lse


def reference_backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(douts, dlses): dlse_p = share_p (dlse + dout . (out_p - out))."""
    shares = _shares(lses, lse)
    wide = dout.to(lse.dtype)
    products = torch.where(shares == 0, 0.0, outs.to(lse.dtype) * wide).sum(-1, keepdim=True)
    mean = (shares * products).sum(0)
    dlses = (shares * (products - mean)).squeeze(-1).mT
    if dlse is not None:
        dlses = dlses + shares.squeeze(-1).mT * dlse
    return (shares * wide).to(dout.dtype).contiguous(), dlses.contiguous()


def _shares(lses: Tensor, lse: Tensor) -> Tensor:
    """exp(lse_p - lse) as [P, .., T, N, 1]; 0 of a part that saw nothing."""
    return (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp().mT.unsqueeze(-1)


def _lse_shape(shape: torch.Size) -> tuple[int, ...]:
    *first, T, N, _ = shape
    return (*first, N, T)


def _sizes(outs: Tensor) -> tuple[int, int, int, int, int]:
    """P, B, T, N, H."""
    *first, T, N, H = outs.shape
    return first[0], first[1] if len(first) > 1 else 1, T, N, H


def _native_forward(outs: Tensor, lses: Tensor) -> Merged:
    outs, lses = outs.contiguous(), lses.contiguous()
    out, lse = torch.empty(outs.shape[1:], dtype=outs.dtype), torch.empty(lses.shape[1:])
    native.run(
        native.module().merge_attention_forward,
        outs, lses, out, lse, *_sizes(outs), native.dtype_code(outs), native.num_threads(),
    )  # fmt: skip
    return out, lse


def _native_backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    dout, outs, lses, lse = (x.contiguous() for x in (dout, outs, lses, lse))
    douts, dlses = torch.empty_like(outs), torch.empty_like(lses)
    native.run(
        native.module().merge_attention_backward,
        dout, 0 if dlse is None else dlse.contiguous(), outs, lses, lse, douts, dlses,
        *_sizes(outs), native.dtype_code(outs), native.num_threads(),
    )  # fmt: skip
    return douts, dlses


def _triton_forward(outs: Tensor, lses: Tensor) -> Merged:
    from pypar.kernels import merge_attention

    return merge_attention.forward(outs.contiguous(), lses.contiguous())


def _triton_backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    from pypar.kernels import merge_attention

    dlse = None if dlse is None else dlse.contiguous()
    return merge_attention.backward(
        dout.contiguous(), dlse, outs.contiguous(), lses.contiguous(), lse.contiguous()
    )


def _native_unsupported(outs: Tensor, lses: Tensor) -> str | None:
    return native_refusal(outs, lses)


def _triton_unsupported(outs: Tensor, lses: Tensor) -> str | None:
    return triton_refusal(outs, lses)


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("triton", _triton_forward, _triton_backward, _triton_unsupported),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)


def _fake_forward(outs: Tensor, lses: Tensor, backend: str) -> Merged:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    outs, lses, ctx.backend = inputs
    ctx.save_for_backward(outs, lses, output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    outs, lses, lse = ctx.saved_tensors
    if dout is None:
        dout = outs.new_zeros(outs.shape[1:])
    return *_backward(dout, dlse, outs, lses, lse, ctx.backend), None


_forward = register(
    "merge_attention",
    "forward",
    "(Tensor outs, Tensor lses, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_forward,
)
_backward = register(
    "merge_attention",
    "backward",
    "(Tensor dout, Tensor? dlse, Tensor outs, Tensor lses, Tensor lse, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_backward,
)
register_gradient("merge_attention", _gradient, _save)
