"""Token embedding whose vocabulary is cut over the tp axis (arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pypar.comm import all_gather_start
from pypar.layout import Cut, Layout
from pypar.mesh import Axis, as_axis
from pypar.ops.uncompiled import between_ranks, uncompiled
from pypar.tensor_parallel.sharded import ShardedModule, fill, part_length, sum_start


class VocabParallelEmbedding(ShardedModule):
    """`nn.Embedding(num_embeddings, embedding_dim)` with weight [V/R, D], this rank's range of token ids.

    ids [...] int64, the same on every rank -> [..., D], the same on every rank; with ``sequence_parallel``
    ids are [B, T] and this rank gets its [B, T/R, D]. The row of ``padding_idx`` starts as zeros and has no
    gradient.

    ValueError: num_embeddings that tp does not divide; on CPU a token id outside of [0, V). On a GPU such an
    id fails a device assertion, as in PyTorch. Initial values: N(0, 1), drawn as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        axis: Axis | dist.ProcessGroup,
        *,
        padding_idx: int | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.axis = as_axis(axis)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = _positive_padding(padding_idx, num_embeddings)
        self.sequence_parallel = sequence_parallel
        part = part_length("num_embeddings, the size of the vocabulary,", num_embeddings, self.axis)
        self.weight = nn.Parameter(torch.empty((part, embedding_dim), dtype=dtype, device=device))
        self.set_layouts()
        self.reset_parameters()

    def layouts(self) -> dict[str, Layout]:
        shape = (self.num_embeddings, self.embedding_dim)
        return {"weight": Layout(shape, (Cut(0, self.axis.names),), self.sum_over)}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw what `nn.Embedding` draws for the whole vocabulary and keep this rank's part.

        ``generator`` (by default torch's global CPU one) must be in the same state on every rank of the axis.
        """

        def draw(whole: Tensor, generator: torch.Generator | None) -> None:
            whole.normal_(generator=generator)
            if self.padding_idx is not None:
                whole[self.padding_idx] = 0

        fill(self.weight, self.layouts()["weight"], self.axis, generator, draw)

    def run(self, ids: Tensor) -> Tensor:
        if self.sequence_parallel and self.axis.size > 1 and ids.dim() < 2:
            raise ValueError(
                "an embedding with sequence_parallel=True cuts dim 1 of ids [B, T], but they have shape "
                f"{tuple(ids.shape)}; pass ids.unsqueeze(0) for a single sequence"
            )
        _check_ids(ids, self.num_embeddings)
        weight = self.part("weight")
        assert weight is not None
        if self.axis.size == 1:
            return nn.functional.embedding(ids, weight, self.padding_idx)
        return _over_ranks(weight, ids, self.padding_idx, self.axis, self.sequence_parallel)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}tp={self.axis.size}, "
            f"sequence_parallel={self.sequence_parallel}"
        )


class _VocabParallel(Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, axis: Axis, sequence_parallel: bool
    ) -> Tensor:
        start = axis.rank * weight.shape[0]
        outside = (ids < start) | (ids >= start + weight.shape[0])
        rows = (ids - start).masked_fill_(outside, 0)
        out = nn.functional.embedding(rows, weight).masked_fill_(outside.unsqueeze(-1), 0)
        if padding_idx is not None:
            outside |= ids == padding_idx  # looked up, but without a gradient
        ctx.save_for_backward(rows, outside)
        ctx.axis, ctx.sequence_parallel, ctx.num_rows = axis, sequence_parallel, weight.shape[0]
        return sum_start(out, axis, sequence_parallel).wait()

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, outside = ctx.saved_tensors
        if ctx.sequence_parallel:
            dout = all_gather_start(dout, ctx.axis, 1).wait()
        # Tokens of other ranks add zeros to row 0: no list of this rank's tokens, whose length a GPU would
        # have to tell.
        dout = dout.masked_fill(outside.unsqueeze(-1), 0)
        dweight = torch.ops.aten.embedding_dense_backward(dout, rows, ctx.num_rows, -1, False)
        return dweight, None, None, None, None


_over_ranks = between_ranks("VocabParallelEmbedding")(_VocabParallel.apply)


def _positive_padding(padding_idx: int | None, num_embeddings: int) -> int | None:
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx ({padding_idx}) must be a token id from 0 to {num_embeddings - 1}, or None"
        )
    return padding_idx % num_embeddings


def _check_ids(ids: Tensor, num_embeddings: int) -> None:
    """Masked lookups would give zeros for an id that no rank has."""
    if ids.is_meta or not ids.numel():
        return
    fits = ((ids >= 0) & (ids < num_embeddings)).all()
    if ids.device.type != "cpu" or torch.compiler.is_compiling():  # nobody waits for the value
        torch._assert_async(fits)
    elif not fits:
        wrong = ids[(ids < 0) | (ids >= num_embeddings)][0]
        raise ValueError(
            f"token id {int(wrong)} is outside of the vocabulary [0, {num_embeddings}); check the tokenizer "
            "against the embedding's num_embeddings"
        )
