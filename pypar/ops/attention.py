"""Attention without storing the scores (Dao et al., arXiv 2205.14135 and 2307.08691)."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.attention_arguments import check_inputs, check_results, check_scale
from pypar.ops.backend import Backend, choose
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype, native_refusal


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v, computed and summed in fp32, each result and gradient rounded once.

    q: [B, T, N, H], k: [B, S, G, H], v: [B, S, G, Hv], one dtype, any strides. N / G query heads share a
    key/value head: query head n uses head n // (N / G).
    causal: the last query is aligned with the last key: query t sees keys 0 .. t + S - T. A query that sees
    no key gives 0, lse -inf and zero gradients. scale: 1 / sqrt(H) when None.

    Returns out [B, T, N, Hv], contiguous, of q's dtype; with return_lse also lse [B, N, T] in fp32 (fp64 for
    fp64), the natural logarithm of the sum of exp(scale * score). Both are differentiable, once.
    ValueError: shapes, dtypes or devices that do not fit, a scale that is not finite, a backend that refuses.
    """
    check_inputs(q, k, v)
    scale = check_scale(scale, q)
    chosen = choose("attention", BACKENDS, {"q": q, "k": k, "v": v}, backend)
    out, lse = _forward(q, k, v, causal, scale, chosen.name)
    return (out, lse) if return_lse else out


@torch.no_grad()
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` with lse and without autograd: (out, lse). For those who write their own backward."""
    check_inputs(q, k, v)
    scale = check_scale(scale, q)
    return choose("attention", BACKENDS, {"q": q, "k": k, "v": v}, backend).forward(q, k, v, causal, scale)


@torch.no_grad()
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: bool,
    scale: float | None,
    backend: str | None = None,
    fp32_gradients: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of attention's inputs for dout [B, T, N, Hv] and dlse [B, N, T] (None: zero).

    out and lse may be the final ones of an attention over more keys than k and v hold: then the results are
    the gradients of these keys and this block's share of dq (dlse is then the final lse's). They have the
    inputs' dtype, or float32 if fp32_gradients, so that shares can be summed before they are rounded.
    """
    check_inputs(q, k, v)
    scale = check_scale(scale, q)
    check_results(q, v, {"dout": dout, "out": out}, {"lse": lse, "dlse": dlse})
    chosen = choose("attention", BACKENDS, {"q": q, "k": k, "v": v}, backend)
    assert chosen.backward is not None
    return chosen.backward(dout, q, k, v, out, lse, dlse, causal, scale, fp32_gradients)


# ---- reference


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """scale * q k^T as [B, G, N / G, T, S], -inf where a query does not see a key."""
    B, T, N, H = q.shape
    S, G = k.shape[1], k.shape[2]
    scores = torch.einsum("btgnh,bsgh->bgnts", q.reshape(B, T, G, N // G, H), k) * scale
    if causal:
        sees = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~sees, -math.inf)
    return scores


def reference_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, computed in fp64. Returns (out [B, T, N, Hv], lse [B, N, T])."""
    B, T, N, _ = q.shape
    scores = _scores(q.double(), k.double(), causal, scale)
    lse = scores.logsumexp(-1) if k.shape[1] else scores.new_full(scores.shape[:-1], -math.inf)
    p = (scores - _finite(lse).unsqueeze(-1)).exp()
    out = torch.einsum("bgnts,bsgh->btgnh", p, v.double()).reshape(B, T, N, v.shape[3])
    return out.to(q.dtype).contiguous(), lse.reshape(B, N, T).to(accumulate_dtype(q)).contiguous()


def reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: bool,
    scale: float,
    fp32_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(score - lse): dv = p^T dout, dscore = p * (dout v^T - sum(dout * out) + dlse)."""
    B, T, N, H = q.shape
    G, Hv = k.shape[2], v.shape[3]
    grouped = B, T, G, N // G
    dout_wide, q_wide, k_wide, lse_wide = dout.double(), q.double(), k.double(), lse.double()
    delta = (dout_wide * out.double()).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    scores = _scores(q_wide, k_wide, causal, scale)
    p = (scores - _finite(lse_wide).reshape(B, G, N // G, T, 1)).exp()
    dp = torch.einsum("btgnh,bsgh->bgnts", dout_wide.reshape(*grouped, Hv), v.double())
    dscores = p * (dp - delta.reshape(B, G, N // G, T, 1)) * scale
    dq = torch.einsum("bgnts,bsgh->btgnh", dscores, k_wide).reshape(q.shape)
    dk = torch.einsum("bgnts,btgnh->bsgh", dscores, q_wide.reshape(*grouped, H))
    dv = torch.einsum("bgnts,btgnh->bsgh", p, dout_wide.reshape(*grouped, Hv))
    dtype = accumulate_dtype(q) if fp32_gradients else q.dtype
    return dq.to(dtype).contiguous(), dk.to(dtype).contiguous(), dv.to(dtype).contiguous()


def _finite(lse: Tensor) -> Tensor:
    """lse, with 0 for rows that see no key: exp(-inf - 0) is 0 where exp(-inf + inf) would be NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _reference_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None


# ---- native


def _native_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return native_refusal(q, k, v)


def _tensor(x: Tensor) -> tuple[int, tuple[int, ...], int]:
    return x.data_ptr(), x.stride(), native.dtype_code(x)


def _sizes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple:
    B, T, N, H = q.shape
    return (B, T, k.shape[1], N, k.shape[2], H, v.shape[3], causal, native.num_threads())


def _native_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    B, T, N, _ = q.shape
    out = torch.empty((B, T, N, v.shape[3]), dtype=q.dtype)
    lse = torch.empty((B, N, T), dtype=torch.float32)
    native.module().attention_forward(
        _sizes(q, k, v, causal), scale, _tensor(q), _tensor(k), _tensor(v), _tensor(out), lse.data_ptr()
    )
    return out, lse


def _native_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: bool,
    scale: float,
    fp32_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(q, k, v, causal)
    dtype = torch.float32 if fp32_gradients else q.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    num_floats, num_counters = native.module().attention_backward_memory(sizes)
    memory, progress = torch.empty(num_floats), torch.zeros(num_counters, dtype=torch.int32)
    native.module().attention_backward(
        sizes,
        scale,
        (_tensor(dout), _tensor(q), _tensor(k), _tensor(v), _tensor(out)),
        (_tensor(dq), _tensor(dk), _tensor(dv)),
        (lse.data_ptr(), 0 if dlse is None else dlse.data_ptr()),
        (memory.data_ptr(), progress.data_ptr()),
    )
    return dq, dk, dv


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("reference", reference_forward, reference_backward, _reference_unsupported),
)


# ---- registration


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    B, T, N, _ = q.shape
    return q.new_empty((B, T, N, v.shape[3])), q.new_empty((B, N, T), dtype=accumulate_dtype(q))


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _dlse, _causal, _scale, fp32_gradients, _backend = options
    dtype = lse.dtype if fp32_gradients else q.dtype
    return (
        q.new_empty(q.shape, dtype=dtype),
        k.new_empty(k.shape, dtype=dtype),
        v.new_empty(v.shape, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = _backward(dout, q, k, v, out, lse, dlse, ctx.causal, ctx.scale, False, ctx.backend)
    return dq, dk, dv, None, None, None


_forward = register(
    "attention",
    "forward",
    "(Tensor q, Tensor k, Tensor v, bool causal, float scale, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_forward,
)
_backward = register(
    "attention",
    "backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, bool causal, "
    "float scale, bool fp32_gradients, str backend) -> (Tensor, Tensor, Tensor)",
    BACKENDS,
    _fake_backward,
)
register_gradient("attention", _gradient, _save)
