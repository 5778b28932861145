"""The roles of context parallelism: attention over all ranks' positions, and which positions a rank has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pypar.axis import Axis
from pypar.context_parallel.attention import ring_attention
from pypar.context_parallel.config import ContextConfig
from pypar.context_parallel.layouts import positions
from pypar.grid import POSITIONS
from pypar.mesh import Mesh
from pypar.role import Match, Role, Spreading
from pypar.sequences import Sequences

AXES = (POSITIONS,)


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
        return f"{self.axis.name}={self.axis.size}, layout={self.context.layout!r}, method={self.context.method!r}"


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
                f"{start} earlier positions are given to a model that is spread over {self.axis.name}="
                f"{self.axis.size}, whose ranks have positions of one whole sequence; generate with a model that is "
                f"not spread over {self.axis.name}"
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
    "attention": Role(nn.Module, AXES, _attention, joins_sequences=True),
    "positions": Role(nn.Module, AXES, _positions),
}


def check_joins_nothing(mesh: Mesh, kind: str) -> None:
    """ValueError where a mesh cuts sequences and no module of a model of this kind sees the whole of them."""
    axis = mesh.axis(*AXES)
    if axis.size > 1:
        raise ValueError(
            f"{axis.name}={axis.size} cuts sequences, and no module of this {kind} has the role "
            '"attention", so that each rank would attend to its own positions only; give a plan with "attention" and '
            f'"positions" (pypar.models.CausalAttention, Positions), or use {axis.name}=1'
        )
