"""Attention with torch's own functions: step by step with every option, and as fast as torch has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pypar.ops.attention.reference import dropout_keep
from pypar.selftest.case import Inputs

Window = tuple[int | None, int | None]


def visible(T: int, S: int, causal: bool, window: Window | None, device: torch.device | str) -> Tensor:
    """[T, S], True where the query sees the key; the last query is at the last key's position."""
    distance = torch.arange(T, device=device)[:, None] + (S - T) - torch.arange(S, device=device)
    left, right = window or (None, None)
    right = 0 if causal else right
    sees = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        sees &= distance <= left
    if right is not None:
        sees &= -distance <= right
    return sees


def visible_pairs(T: int, S: int, causal: bool = False, window: Window | None = None) -> int:
    """The number of True in `visible`, without making it."""
    position = torch.arange(T) + (S - T)
    left, right = window or (None, None)
    right = 0 if causal else right
    first = torch.zeros_like(position) if left is None else (position - left).clamp(0, S)
    last = torch.full_like(position, S) if right is None else (position + right + 1).clamp(0, S)
    return int((last - first).clamp(min=0).sum())


def flops(pairs: int, N: int, H: int, Hv: int) -> tuple[float, float]:
    """Of forward (q k, p v) and of backward (q k again, dp, dv, dq, dk), for the pairs of a batch that are visible."""
    return 2.0 * pairs * N * (H + Hv), 2.0 * pairs * N * (3 * H + 2 * Hv)


def plain(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    batch_start: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """What one writes without a fused operator, every step in the inputs' dtype."""
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        parts = []
        for i, (rows, keys) in enumerate(
            zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True), start=batch_start
        ):
            parts.append(
                plain(q[None, rows], k[None, keys], v[None, keys], batch_start=i, return_lse=True, **options)
            )
        out, lse = (torch.cat([part[i][0] for part in parts], dim) for i, dim in ((0, 0), (1, 1)))
        return (out, lse) if return_lse else out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[..., None, None] * distances(T, S, q.device)).to(scores.dtype)
    sees = visible(T, S, causal, window, q.device)
    scores = scores.masked_fill(~sees, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    p = scores.softmax(-1)[..., :S].masked_fill(~sees, 0.0)
    if dropout_p:
        p = p * kept(q.shape[0], q.shape[1], T, S, dropout_p, dropout_seed, q.device, batch_start).to(p.dtype)
    out = (p @ v).transpose(1, 2)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (out, wide.logsumexp(-1)) if return_lse else out


def kept(
    B: int, N: int, T: int, S: int, p: float, seed: int, device: torch.device, batch_start: int = 0
) -> Tensor:
    """What dropout multiplies the probabilities by, [B, N, T, S] of 0 and 1 / (1 - p)."""
    batch = torch.arange(B, device=device)[:, None, None, None] + batch_start
    head = torch.arange(N, device=device)[:, None, None]
    row = torch.arange(T, device=device)[:, None] + (S - T)
    keep = dropout_keep(seed, p, batch, head, row, torch.arange(S, device=device))
    return keep.double() / (1 - p)


def distances(T: int, S: int, device: torch.device | str) -> Tensor:
    return (torch.arange(T, device=device)[:, None] + (S - T) - torch.arange(S, device=device)).abs()


def spans(cu_seqlens: Tensor) -> list[slice]:
    ends = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """torch's fused attention on tensors laid out as pypar's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p, enable_gqa=k.shape[1] != q.shape[1]
    ).transpose(1, 2)


def padded(inputs: Inputs, causal: bool) -> Inputs:
    """Sequences one after the other become a batch of the longest's length, with the mask that torch needs."""
    sides = {"q": "cu_seqlens_q", "k": "cu_seqlens_k", "v": "cu_seqlens_k"}
    padded_inputs = {}
    for name, side in sides.items():
        parts = [inputs[name][span] for span in spans(inputs[side])]
        padded_inputs[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    T, S = padded_inputs["q"].shape[1], padded_inputs["k"].shape[1]
    lengths = [
        (rows.stop - rows.start, keys.stop - keys.start)
        for rows, keys in zip(spans(inputs["cu_seqlens_q"]), spans(inputs["cu_seqlens_k"]), strict=True)
    ]
    mask = torch.zeros(len(lengths), 1, T, S, dtype=torch.bool, device=inputs["q"].device)
    for i, (rows, keys) in enumerate(lengths):
        mask[i, 0, :rows, :keys] = visible(rows, keys, causal, None, mask.device)
    return {**padded_inputs, "mask": mask}
