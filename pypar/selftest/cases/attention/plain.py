"""Attention as one writes it without a fused operator, differentiated by autograd: the yardstick of its accuracy.

Every step is taken in the inputs' dtype: "plain", the error that is allowed. With fp64 inputs it is "exact". It
follows the definition of pypar.attention and shares no code with pypar's reference but the dropout generator and the
names of the options.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pypar.ops.attention.arguments import Positions, ScoreOptions, Window
from pypar.ops.attention.reference import dropout_keep


@dataclass(frozen=True, eq=False)
class Options(ScoreOptions):
    """The keywords of pypar.attention, and positions; None: the last query is at the last key's position."""

    dropout_seed: int = 0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    positions: Positions | None = None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = True, **keywords: Any) -> Any:
    """(out, lse) of pypar.attention's arguments, or out; lse in fp32, or in fp64 for fp64."""
    options = Options(**keywords)
    if options.cu_seqlens_q is None or options.cu_seqlens_k is None:
        out, terms = _attend(q, k, v, options, 0)
        return (out, _lse(*terms)) if return_lse else out
    # Of zero rows, so that there is something to join when there is no sequence.
    none = q[None, :0], k[None, :0], v[None, :0]
    parts = [_attend(*none, options, 0)]
    rows, keys = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    for b in range(len(rows) - 1):
        row, key = slice(rows[b], rows[b + 1]), slice(keys[b], keys[b + 1])
        parts.append(_attend(q[None, row], k[None, key], v[None, key], options, b))
    out = torch.cat([part for part, _ in parts], 1)[0]
    return (out, torch.cat([_lse(*terms) for _, terms in parts], 2)[0]) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, first: int
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """out, and what `_lse` needs. With a batch dimension, whose elements are the sequences `first`, first + 1, ..."""
    B, T, N, H = q.shape
    S, G = k.shape[1:3]
    at = options.positions or Positions(q_start=S - T)
    pq = at.q_start + at.step * torch.arange(T, device=q.device)
    pk = at.k_start + at.step * torch.arange(S, device=q.device)
    k, v = (x.repeat_interleave(N // G, 2).permute(0, 2, 1, 3) for x in (k, v))
    x = q.permute(0, 2, 1, 3) @ k.transpose(2, 3) * (H**-0.5 if options.scale is None else options.scale)
    if options.softcap > 0:
        x = torch.tanh(x / options.softcap) * options.softcap
    if options.bias is not None:
        x = (x + options.bias).to(q.dtype)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes
        slopes = slopes[first : first + B] if slopes.dim() == 2 else slopes[None]
        distance = (pq[:, None] - pk[None, :]).abs()
        x = (x - slopes[:, :, None, None] * distance).to(q.dtype)
    seen = sees(pq, pk, options.causal, options.window)
    if options.bias is not None:
        seen = seen & (x != -math.inf)
    terms, blind = x.masked_fill(~seen, -math.inf), None
    if options.sinks is not None:
        terms = torch.cat((terms, options.sinks.to(q.dtype)[None, :, None, None].expand(B, N, T, 1)), -1)
    else:
        if S == 0:
            terms = torch.cat((terms, terms.new_zeros(B, N, T, 1)), -1)
        if not seen.any(-1).all():
            # A row that sees nothing gets finite scores, whose results are then replaced by constants.
            blind = ~seen.any(-1, keepdim=True)
            terms = terms.masked_fill(blind, 0)
    p = terms.softmax(-1)[..., :S]
    if blind is not None:
        p = p.masked_fill(blind, 0)
    if options.dropout_p > 0:
        keep = _keep((B, N, T, S), first, at, options.dropout_seed, options.dropout_p, q.device)
        p = (p / (1 - options.dropout_p)).masked_fill(~keep, 0)
    return (p @ v).permute(0, 2, 1, 3), (terms, blind)


def _lse(terms: Tensor, blind: Tensor | None) -> Tensor:
    wide = terms if terms.dtype == torch.float64 else terms.float()
    lse = wide.logsumexp(-1)
    return lse if blind is None else lse.masked_fill(blind[..., 0], -math.inf)


def sees(pq: Tensor, pk: Tensor, causal: bool, window: Window | None) -> Tensor:
    """[T, S], True where the query at a position of pq [T] sees the key at one of pk [S]."""
    left, right = (-1 if side is None else side for side in window or (None, None))
    if causal:
        right = 0
    seen = torch.ones(len(pq), len(pk), dtype=torch.bool, device=pq.device)
    if left >= 0:
        seen &= pk[None, :] >= pq[:, None] - left
    if right >= 0:
        seen &= pk[None, :] <= pq[:, None] + right
    return seen


@functools.lru_cache(maxsize=8)
def _keep(
    shape: tuple[int, int, int, int], first: int, at: Positions, seed: int, p: float, device: torch.device
) -> Tensor:
    """[B, N, T, S]: which probabilities dropout keeps. Remembered, as plain and exact ask for the same."""
    B, N, T, S = shape
    batch, head = (
        start + torch.arange(n, device=device)
        for start, n in ((at.batch_start + first, B), (at.head_start, N))
    )
    pq, pk = (
        start + at.step * torch.arange(n, device=device) for start, n in ((at.q_start, T), (at.k_start, S))
    )
    # Some rows at a time: the generator's many steps then stay in the cache.
    blocks = [
        dropout_keep(seed, p, batch[:, None, None, None], head[:, None, None], rows[:, None], pk)
        for rows in pq.split(64)
    ]
    return torch.cat(blocks, 2)
