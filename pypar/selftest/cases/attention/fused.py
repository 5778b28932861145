"""Attention by torch's fused function: what it needs for each option, and the work that cannot be avoided."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pypar.ops.attention.arguments import Window
from pypar.selftest.case import Inputs
from pypar.selftest.cases.attention.plain import sees


def visible(T: int, S: int, causal: bool, window: Window | None, device: torch.device | str) -> Tensor:
    """[T, S], True where the query sees the key; the last query is at the last key's position."""
    return sees(torch.arange(T, device=device) + (S - T), torch.arange(S, device=device), causal, window)


def visible_pairs(T: int, S: int, causal: bool = False, window: Window | None = None) -> int:
    """The number of True in `visible`, without making it."""
    position = torch.arange(T) + (S - T)
    left, right = window or (None, None)
    right = 0 if causal else right
    first = torch.zeros_like(position) if left is None else (position - left).clamp(0, S)
    last = torch.full_like(position, S) if right is None else (position + right + 1).clamp(0, S)
    return int((last - first).clamp(min=0).sum())


def flops(pairs: int, N: int, H: int, Hv: int) -> tuple[float, float]:
    """Operations of forward (q k, p v) and backward (q k again, dp, dv, dq, dk), for a batch's visible pairs."""
    return 2.0 * pairs * N * (H + Hv), 2.0 * pairs * N * (3 * H + 2 * Hv)


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
