"""From a step's global batch to the microbatches of one rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.context_parallel import shard
from pypar.grid import POSITIONS, SAMPLES
from pypar.mesh import Mesh
from pypar.sequences import Sequences


@dataclass(frozen=True)
class Microbatch:
    """tokens, targets: int64 [b, T], this rank's sequences and positions; loss_scale: 1 / targets of the step.

    sequences: the whole of them.
    """

    tokens: Tensor
    targets: Tensor
    loss_scale: float
    sequences: Sequences


def split_batch(
    tokens: Tensor,
    targets: Tensor,
    mesh: Mesh,
    *,
    microbatch_size: int,
    layout: str,
    device: torch.device,
    documents: Sequence[Tensor] | None = None,
) -> list[Microbatch]:
    """This rank's microbatches of a global batch (tokens, targets: [B, T], target -100 = not learned).

    documents: of each sequence, as in `Sequences`.
    Every rank sees the whole batch, so the number of targets, which divides the loss, needs no communication.
    """
    scale = 1.0 / max(1, int((targets != -100).sum()))
    samples, positions = mesh.axis(SAMPLES), mesh.axis(POSITIONS)
    local = tokens.shape[0] // samples.size
    start = samples.rank * local
    parts = []
    for first in range(start, start + local, microbatch_size):
        rows = slice(first, first + microbatch_size)
        pair = [shard(x[rows], 1, positions, layout).contiguous().to(device) for x in (tokens, targets)]
        sequences = Sequences(tokens.shape[1], None if documents is None else tuple(documents[rows]))
        parts.append(Microbatch(pair[0], pair[1], scale, sequences))
    return parts
