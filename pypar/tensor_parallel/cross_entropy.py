"""Cross-entropy of logits whose vocabulary is cut over the tp axis; the logits are never gathered.

Each rank r has the maximum m_r and the total t_r = sum exp(logits - m_r) of its part. With M = max_r m_r, the
loss is log sum_r t_r exp(m_r - M) - (logits[target] - M). So three numbers a token travel (M, the sum, the
target's logit less M), in two all-reduces, whatever the vocabulary. Source: Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pypar.comm import all_reduce_start
from pypar.mesh import Axis
from pypar.ops.backend import choose
from pypar.ops.cross_entropy import BACKENDS, check_range, check_targets, cross_entropy
from pypar.ops.uncompiled import between_ranks, uncompiled


def vocab_parallel_cross_entropy(
    logits_shard: Tensor, targets: Tensor, axis: Axis, ignore_index: int = -100
) -> Tensor:
    """logsumexp(logits) - logits[target] of each token, in nats, fp32, not reduced.

    logits_shard: [..., V/R], this rank's range of the vocabulary; targets: [...] int64 in [0, V) or
    ``ignore_index``, the same on every rank. Returns [...] fp32, the same on every rank; an ignored token
    gives 0 and no gradient.

    ValueError: shapes that do not fit, targets that are not int64, on CPU a target out of range.
    """
    if axis.size == 1:
        return cross_entropy(logits_shard, targets, ignore_index)
    return _over_ranks(logits_shard, targets, axis, ignore_index)


@between_ranks("vocab_parallel_cross_entropy")
def _over_ranks(logits_shard: Tensor, targets: Tensor, axis: Axis, ignore_index: int) -> Tensor:
    check_targets(targets, "logits_shard", logits_shard)
    _check_range(targets, logits_shard.shape[-1] * axis.size, ignore_index)
    return _VocabParallelCrossEntropy.apply(logits_shard, targets, axis, ignore_index)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, ignore_index: int) -> Tensor:
        start, ignored = axis.rank * logits.shape[-1], targets == ignore_index
        here = (targets >= start) & (targets < start + logits.shape[-1]) & ~ignored
        # Where another rank has the target, any target of this rank gives the same total: 0, which backward undoes.
        rows = torch.where(here, targets - start, 0).masked_fill_(ignored, _IGNORED)
        backend = choose("cross_entropy", BACKENDS, {"logits": logits, "targets": rows}, None).name
        _, part_max, part_total = torch.ops.pypar.cross_entropy_forward(logits, rows, _IGNORED, backend)
        part_max.masked_fill_(part_total == 0, -torch.inf)  # nothing but -inf here: no say in the maximum
        maximum = all_reduce_start(part_max.clone(), axis, dist.ReduceOp.MAX).wait()
        picked = logits.gather(-1, rows.clamp(0).unsqueeze(-1)).squeeze(-1) - maximum
        packed = torch.stack((part_total * torch.exp(part_max - maximum), torch.where(here, picked, 0)))
        total, target_logit = all_reduce_start(packed, axis).wait()
        ctx.save_for_backward(logits, rows, ~(here | ignored), maximum, total)
        ctx.backend = backend
        return torch.where(ignored, 0, total.log() - target_logit)

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, rows, elsewhere, maximum, total = ctx.saved_tensors
        dlogits = torch.ops.pypar.cross_entropy_backward(
            dloss, logits, rows, maximum, total, _IGNORED, ctx.backend
        )
        first = torch.exp(logits[..., 0] - maximum) / total * dloss
        dlogits[..., 0] = torch.where(elsewhere, first.to(dlogits.dtype), dlogits[..., 0])
        return dlogits, None, None, None


_IGNORED = -1  # the ignore_index of targets that count from this rank's first token


def _check_range(targets: Tensor, vocabulary_size: int, ignore_index: int) -> None:
    """A target that no rank has would silently count as a logit of 0."""
    if targets.is_meta or not targets.numel():
        return
    if targets.device.type == "cpu":
        check_range(targets, vocabulary_size, ignore_index)
    else:
        is_word = (targets >= 0) & (targets < vocabulary_size)
        torch._assert_async((is_word | (targets == ignore_index)).all())
