"""`pypar.attention` under the signature of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pypar.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Takes the place of torch's function: the same arguments, shapes and meaning.

    Args:
        query: [..., N, T, H]; key: [..., G, S, H]; value: [..., G, S, Hv]. Leading dimensions broadcast.
        attn_mask: broadcasts to [..., N, T, S]. bool: True where a query sees a key. Floating point: added to the
            scores; differentiable.
        dropout_p: as in `pypar.attention`: other elements are dropped than torch would drop.
        is_causal: query t sees keys 0 .. t (the first query at the first key, unlike in `pypar.attention`).
        enable_gqa: N may be a multiple of G.

    Returns [..., N, T, Hv]. A query that sees no key gives 0. ValueError: arguments that do not fit.
    """
    if is_causal and attn_mask is not None:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other; put the causal part into attn_mask"
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{name} {tuple(x.shape)} must be [..., positions, head size]; unsqueeze it")
    dims = max(query.dim(), key.dim(), value.dim())
    q, k, v = (_at_least_4d(x) for x in (query, key, value))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    N, G = q.shape[-3], max(k.shape[-3], v.shape[-3])
    if N != G and G != 1 and not enable_gqa:
        raise ValueError(f"query has {N} heads and key {G}; pass enable_gqa=True for groups of query heads")
    q = q.expand(*batch, *q.shape[-3:]).flatten(0, -4)
    k, v = (x.expand(*batch, G, *x.shape[-2:]).flatten(0, -4) for x in (k, v))
    T, S = q.shape[-2], k.shape[-2]
    bias, window = None, None
    if attn_mask is not None:
        bias = _as_bias(attn_mask, q)
        if bias.dim() > 4:
            bias = bias.expand(*batch, *bias.shape[-3:]).flatten(0, -4)
    if is_causal:
        # In attention the last query and the last key are at one position, here the first ones are.
        k, v = k[..., :T, :], v[..., :T, :]
        window = (None, T - min(S, T))
    out = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        bias=bias,
        window=window,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    ).transpose(1, 2)
    return out.unflatten(0, batch) if dims > 4 else out.reshape(out.shape[4 - dims :])


def _at_least_4d(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x


def _as_bias(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as something to add to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, -math.inf)
    return mask if mask.dtype == torch.float32 else mask.to(q.dtype)
