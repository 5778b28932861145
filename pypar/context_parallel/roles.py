"""The roles of context parallelism: attention over all ranks' positions, and which positions a rank has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pypar.axis import Axis
from pypar.context_parallel.attention import ring_attention
from pypar.context_parallel.config import ContextConfig
from pypar.context_parallel.layouts import positions
from pypar.role import Match, Role, Spreading
from pypar.sequences import Sequences


class ContextParallelAttention(nn.Module):
    """Causal attention of this rank's positions to those of all ranks of an axis.

    q [B, T, N, H], k and v [B, S, G, H] of this rank -> [B, T, N, H]. ``sequences`` None: every rank has equally many
    positions, and a sequence is one document.
    """

    def __init__(self, axis: Axis, context: ContextConfig) -> None:
        super().__init__()
        self.axis, self.context = axis, context

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None = None) -> Tensor:
        if sequences is None:
            sequences = Sequences(q.shape[1] * self.axis.size)
        if sequences.documents is None:
            return self._over_ranks(q, k, v, sequences.length, None)
        # Each sequence has documents of its own.
        rows = zip(q, k, v, sequences.documents, strict=True)
        return torch.stack([self._over_ranks(a, b, c, sequences.length, ends) for a, b, c, ends in rows])

    def _over_ranks(self, q: Tensor, k: Tensor, v: Tensor, length: int, documents: Tensor | None) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            self.axis,
            layout=self.context.layout,
            method=self.context.method,
            cu_seqlens=documents,
            length_q=length,
            length_k=length,
            method_options=self.context.method_options,
        )

    def extra_repr(self) -> str:
        return f"cp={self.axis.size}, layout={self.context.layout!r}, method={self.context.method!r}"


class RankPositions(nn.Module):
    """The positions, in the whole sequence, of what this rank has.

    x: what the model is given, [B, T, ...] -> int64 [T]. ``sequences`` None: every rank has equally many positions.
    """

    def __init__(self, axis: Axis, layout: str) -> None:
        super().__init__()
        self.axis, self.layout = axis, layout

    def forward(self, x: Tensor, sequences: Sequences | None = None, start: int = 0) -> Tensor:
        if start:
            raise ValueError(
                f"{start} earlier positions are given to a model that is spread over cp={self.axis.size}, whose ranks "
                "have positions of one whole sequence; generate with a model that is not spread over cp"
            )
        length = x.shape[1] * self.axis.size if sequences is None else sequences.length
        return positions(length, self.axis, self.layout).to(x.device)


def _context(spreading: Spreading) -> ContextConfig:
    return spreading.context or ContextConfig()


def _attention(match: Match, spreading: Spreading) -> nn.Module:
    return ContextParallelAttention(spreading.axis(ROLES[match.role]), _context(spreading))


def _positions(match: Match, spreading: Spreading) -> nn.Module:
    return RankPositions(spreading.axis(ROLES[match.role]), _context(spreading).layout)


ROLES = {
    "attention": Role(nn.Module, ("cp",), _attention),
    "positions": Role(nn.Module, ("cp",), _positions),
}
