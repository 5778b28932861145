"""The loss of a language model straight from its last hidden state, without the logits of all tokens at once.

Sources: Liger's chunks and the gradient in forward (arXiv 2410.10989), the online softmax (arXiv 1805.02867).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pypar.ops.backend import choose
from pypar.ops.linear_cross_entropy import operator
from pypar.ops.linear_cross_entropy.backends import BACKENDS
from pypar.ops.linear_cross_entropy.loss import (
    LossKeywords,
    LossOptions,
    TokenParts,
    check,
    token_loss,
    token_weights_of,
)
from pypar.ops.register import overridable
from pypar.ops.rows import accumulate_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BACKENDS", "linear_cross_entropy"]


@overridable
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> Any:
    """Cross-entropy of softmax(hidden @ weight.T + bias) with target, in nats; the logits are computed in fp32.

    hidden: [..., H], weight: [V, H], of one dtype; bias: [V] or None; target: [...] int64 in [0, V) or ignore_index;
    token_weights: [...], a factor of each token's loss, or None. fp64 is computed in fp64.

    ignore_index=-100: a token that counts nowhere. reduction: "mean" (the sum over the sum of weights of tokens that
    are not ignored; 0 where that is 0), "sum" or "none". label_smoothing=0.0: the share of probability that all words
    get in equal parts, as in torch. z_loss=0.0: the coefficient of lse^2, which is added. softcap=None: logits become
    softcap * tanh(logits / softcap).

    Returns the loss, fp32: a scalar, or [...] for "none". With return_lse, return_logprob the tuple goes on with
    logsumexp(logits) and the target's log-probability of each token [...], fp32, 0 where ignored, without gradient.

    Memory: logits of 64 to 512 tokens at a time on a CPU, of 1,024 to 4,096 on a GPU. "mean" and "sum" find the
    gradients in forward (three products instead of four); bf16 weights then have an fp32 sum of their gradient
    meanwhile. What needs no gradient has no buffer for one. It differentiates once; a second backward over the same
    graph computes the logits again.

    ValueError: shapes, dtypes or options that do not fit, on CPU a target out of range, a backend that refuses.
    """
    chosen = LossOptions(**options)
    check(hidden, weight, target, bias, token_weights)
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    name = choose("linear_cross_entropy", BACKENDS, arguments, backend).name
    return compute(_OneDevice(name), hidden, weight, target, bias, token_weights, chosen)


class _OneDevice:
    """Who has the whole vocabulary."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def parts(self, *arguments: Any) -> tuple[Tensor, ...]:
        return operator.parts(*arguments, self.backend)

    def with_gradients(self, *arguments: Any) -> tuple[Tensor, ...]:
        return operator.with_gradients(*arguments, self.backend)


def compute(
    how: Any,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    options: LossOptions,
) -> Any:
    """The loss by `how`, whose `parts` and `with_gradients` are those of operator.py but for the backend."""
    smoothing, z_loss, softcap = options.label_smoothing, options.z_loss, float(options.softcap or 0.0)
    weights = token_weights_of(target, token_weights, options, accumulate_dtype(hidden))
    needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    inputs = (hidden, weight, bias, target)
    if (
        torch.is_grad_enabled()
        and any(needs)
        and options.reduction != "none"
        # Gradients in forward know nothing of what these multiply them with later.
        and not weights.each.requires_grad
        # Their gradients may need the factor that comes with backward: fp16 has no room for them without it.
        and hidden.dtype != torch.float16
        and not _is_in_transform()
    ):
        arguments = (
            *inputs,
            weights.each,
            weights.divisor,
            options.ignore_index,
            softcap,
            smoothing,
            z_loss,
            needs,
        )
        loss, *found = how.with_gradients(*arguments)
        parts = TokenParts(*found[:4])
    else:
        parts = TokenParts(*how.parts(*inputs, options.ignore_index, softcap, smoothing != 0))
        loss = token_loss(parts, smoothing, z_loss)
        loss = loss * weights.each if options.reduction == "none" else weights.total(loss)
    if not (options.return_lse or options.return_logprob):
        return loss
    log_total = parts.total.detach().log()
    lse = (log_total + parts.maximum.detach(),) if options.return_lse else ()
    logprob = (parts.target_logit.detach() - log_total,) if options.return_logprob else ()
    return loss, *lse, *logprob


def _is_in_transform() -> bool:
    """torch.func's transforms differentiate with a graph, so that the gradients of forward would not be taken."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
