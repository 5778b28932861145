"""Layers of a model on one device, which a plan can give roles: linear, head, norm, causal attention, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pypar.ops import attention, linear, linear_cross_entropy, rms_norm
from pypar.sequences import Sequences


class Linear(nn.Linear):
    """`nn.Linear` by `pypar.ops.linear`, without a bias; it draws no initial values."""

    computes_as = nn.Linear  # what pypar.parallel asks of a subclass

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)

    def reset_parameters(self) -> None:
        """A model gives its weights values by their names, when all are there."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Head(Linear):
    """A `Linear` to the logits of a vocabulary; given targets, it gives their loss, for which no logits are kept.

    x [..., D] -> [..., V]; with targets [...] int64, where -100 is not learned, the sum of their cross-entropy in nats,
    fp32, which is differentiated once.
    """

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, reduction="sum")


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): x [..., D] -> [..., D]; with a residual (norm of x + residual, sum)."""

    def __init__(self, d_model: int, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, residual=residual)


class CausalAttention(nn.Module):
    """Causal attention to the positions of one device.

    q [B, T, N, H], k and v [B, S, G, H] -> [B, T, N, H]; T queries are the last of S positions. With documents in
    ``sequences`` (T = S), a position sees its own document only.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None = None) -> Tensor:
        if sequences is None or sequences.documents is None:
            return attention(q, k, v, causal=True)
        ends = sequences.joined_documents().to(q.device)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = attention(*flat, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
        return out.unflatten(0, q.shape[:2])


class Positions(nn.Module):
    """The positions of what a model is given: from ``start`` on, int64 [T].

    x: [B, T, ...]. ``sequences`` knows T where x has only some of the positions, as between layers under sequence
    parallelism.
    """

    def forward(self, x: Tensor, sequences: Sequences | None = None, start: int = 0) -> Tensor:
        length = x.shape[1] if sequences is None else sequences.length
        return torch.arange(start, start + length, device=x.device)
