"""Causal attention of a decoder whose sequences are spread over the cp axis, and may hold several documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.context_parallel import ring_attention
from pypar.mesh import Axis
from pypar.ops import attention


@dataclass(frozen=True)
class ContextParallel:
    """layout, method: as in `pypar.ring_attention`. ulysses_size: of the method "hybrid"; 0 leaves it the choice."""

    layout: str = "zigzag"
    method: str = "ring"
    ulysses_size: int = 0

    @property
    def method_options(self) -> dict[str, int]:
        return {"ulysses_size": self.ulysses_size} if self.method == "hybrid" and self.ulysses_size else {}


@dataclass(frozen=True)
class Sequences:
    """What a rank's part does not tell of the whole.

    length: positions of a whole sequence. documents: for each sequence of the batch, where its documents begin
    and end, int32 [documents + 1] on CPU; a position sees its own document only. None: each is one.
    """

    length: int
    documents: tuple[Tensor, ...] | None = None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, axis: Axis, context: ContextParallel, sequences: Sequences | None
) -> Tensor:
    """q [B, T, N, H], k and v [B, S, G, H] of this rank; out [B, T, N, H]. sequences None: one rank has them whole."""
    if sequences is None:
        return attention(q, k, v, causal=True)
    if axis.size == 1:
        if sequences.documents is None:
            return attention(q, k, v, causal=True)
        ends = _joined(sequences.documents, q.shape[1]).to(q.device)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = attention(*flat, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
        return out.unflatten(0, q.shape[:2])

    def over_ranks(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            axis,
            layout=context.layout,
            method=context.method,
            cu_seqlens=documents,
            length_q=sequences.length,
            length_k=sequences.length,
            method_options=context.method_options,
        )

    if sequences.documents is None:
        return over_ranks(q, k, v, None)
    # Each sequence has documents of its own.
    return torch.stack([over_ranks(*row) for row in zip(q, k, v, sequences.documents, strict=True)])


def _joined(documents: tuple[Tensor, ...], length: int) -> Tensor:
    """The documents of sequences of `length` positions as those of one sequence after the other."""
    shifted = [ends[1:] + row * length for row, ends in enumerate(documents)]
    return torch.cat([documents[0][:1], *shifted])
