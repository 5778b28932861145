"""Whole sequences, of which a rank may hold some positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """What a rank's part does not tell of the whole.

    length: positions of a whole sequence. documents: for each sequence of the batch, where its documents begin
    and end, int32 [documents + 1] on CPU; a position sees its own document only. None: each is one.
    """

    length: int
    documents: tuple[Tensor, ...] | None = None

    def joined_documents(self) -> Tensor:
        """The documents of all sequences as those of one, in which they stand one after the other."""
        assert self.documents is not None
        shifted = [ends[1:] + row * self.length for row, ends in enumerate(self.documents)]
        return torch.cat([self.documents[0][:1], *shifted])
