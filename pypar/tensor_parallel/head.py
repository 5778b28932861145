"""The last layer of a language model, whose vocabulary is cut over the tp axis: logits, or their loss without them."""

from __future__ import annotations

from torch import Tensor

from pypar.comm import gather_replicated
from pypar.tensor_parallel.column import ColumnParallelLinear
from pypar.tensor_parallel.linear_cross_entropy import linear_cross_entropy
from pypar.tensor_parallel.sharded import autocast, check_sequence
from pypar.tensor_parallel.vocabulary_parts import loss_of_parts


class VocabParallelHead(ColumnParallelLinear):
    """`ColumnParallelLinear` to the V/R logits of this rank's words; with targets, what `pypar.models.Head` gives.

    targets: int64 [...], one for each row of x, with ``sequence_parallel`` [B, T] beside this rank's x [B, T/R, D]; the
    same on every rank, as is the loss. No rank has logits of more than a chunk of tokens then.

    ValueError, on every rank: what `pypar.linear_cross_entropy` refuses.
    """

    def run(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().run(x)
        if self.sequence_parallel and self.axis.size > 1:
            check_sequence("a head", x)
            x = gather_replicated(x, self.axis, 1)
        hidden, weight, bias = autocast((x, self.part("weight"), self.part("bias")))
        assert hidden is not None and weight is not None
        if self.axis.size == 1:
            return linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum")
        sizes = [self.out_features // self.axis.size] * self.axis.size
        return loss_of_parts(hidden, weight, targets, self.axis, sizes, bias=bias, reduction="sum")
