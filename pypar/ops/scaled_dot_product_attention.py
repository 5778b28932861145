"""`pypar.attention` under the signature of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pypar.ops.attention import attention
from pypar.ops.attention.checks import check_tensor
from pypar.ops.register import overridable

_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what torch.autocast converts


@overridable
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

    torch.autocast is honoured.

    Returns [..., N, T, Hv]. A query that sees no key gives 0; what is hidden from a query (by False or -inf) may hold
    anything where `pypar.attention` says so. ValueError: arguments that do not fit.
    """
    options = {"dropout_p": dropout_p, "scale": scale, "backend": backend}
    return as_torch(attention, (query, key, value), attn_mask, is_causal, enable_gqa, options)


def as_torch(
    attend: Callable[..., Tensor],
    operands: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    options: Mapping[str, object],
    num_keys: int | None = None,
) -> Tensor:
    """Torch's arguments for a function that takes those of `pypar.attention`; options goes to it as it is.

    num_keys: keys that attn_mask has a column for, where these are not those of the operands.
    """
    query, key, value = operands
    if is_causal and attn_mask is not None:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other; put the causal part into attn_mask"
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name} {tuple(x.shape)} must be [..., positions, head size]; unsqueeze it")
    dims = max(query.dim(), key.dim(), value.dim())
    q, k, v = (_at_least_4d(x) for x in under_autocast(query, key, value))
    batch, N, G = _batch_and_heads(q, k, v, enable_gqa)
    T, S = q.shape[-2], k.shape[-2]
    q = q.expand(*batch, N, -1, -1).flatten(0, -4)
    k, v = (x.expand(*batch, G, -1, -1).flatten(0, -4) for x in (k, v))
    bias, window = None, None
    if attn_mask is not None:
        bias = _as_bias(attn_mask, q, (*batch, N, T, S if num_keys is None else num_keys))
        if bias.dim() > 3 and len(batch) > 1:
            bias = bias.expand(*batch, *bias.shape[-3:]).flatten(0, -4)
    if is_causal:
        # In attention the last query and the last key are at one position, here the first ones are.
        k, v = k[..., :T, :], v[..., :T, :]
        window = (None, T - min(S, T))
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), bias=bias, window=window, **options).transpose(1, 2)
    return out.unflatten(0, batch) if dims > 4 else out.reshape(out.shape[4 - dims :])


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch.autocast hands them to torch's function: in its dtype, where it is on."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in _CAST else x for x in tensors)


def _at_least_4d(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x


def _batch_and_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[torch.Size, int, int]:
    """(dimensions before the heads, query heads, key/value heads) after broadcasting."""
    try:
        batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"query {tuple(q.shape)}, key {tuple(k.shape)} and value {tuple(v.shape)} must have batch dimensions "
            "that broadcast"
        ) from None
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"value has {v.shape[-2]} positions and key {k.shape[-2]}; each key needs one value")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"key has head size {k.shape[-1]} and query {q.shape[-1]}; make them the same")
    N, G = q.shape[-3], max(k.shape[-3], v.shape[-3])
    if not {k.shape[-3], v.shape[-3]} <= {1, G}:
        raise ValueError(f"value has {v.shape[-3]} heads and key {k.shape[-3]}; give them the same number")
    if enable_gqa and (G == 0 or N % G):
        raise ValueError(f"query has {N} heads and key {G}; query's number must be a multiple of key's")
    if N not in (1, G) and G != 1 and not enable_gqa:
        raise ValueError(f"query has {N} heads and key {G}; pass enable_gqa=True for groups of query heads")
    return batch, max(N, G), G


def _as_bias(mask: Tensor, q: Tensor, scores: tuple[int, ...]) -> Tensor:
    """A mask as something to add to the scores, whose shape it must broadcast to."""
    check_tensor("attn_mask", mask)
    fits = mask.dim() <= len(scores) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits or mask.device != q.device:
        raise ValueError(
            f"attn_mask {tuple(mask.shape)} on {mask.device} must broadcast to [..., N, T, S] = {scores} on {q.device}"
        )
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, -math.inf)
    if mask.dtype not in (*_CAST, q.dtype):
        raise ValueError(
            f"attn_mask is {mask.dtype}; it must be torch.bool (True: seen) or query's {q.dtype} (added to the "
            "scores): convert it"
        )
    return mask if mask.dtype == torch.float32 else mask.to(q.dtype)
