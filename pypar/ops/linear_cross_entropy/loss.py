"""The formula of the loss, on numbers of tokens: log-probabilities, smoothing, z-loss, weights, reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from pypar.ops.cross_entropy import check_targets
from pypar.ops.linear_cross_entropy.passes import CoefficientsOf
from pypar.ops.linear_cross_entropy.rows import Coefficients

REDUCTIONS = ("mean", "sum", "none")


class LossKeywords(TypedDict, total=False):
    """The fields of `LossOptions`, for type checkers."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None
    return_lse: bool
    return_logprob: bool


@dataclass(frozen=True)
class LossOptions:
    """What the loss is made of beside the logits; see `linear_cross_entropy`."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    return_lse: bool = False
    return_logprob: bool = False

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r} and must be one of {', '.join(REDUCTIONS)}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) must lie in [0, 1]: it is the share of the probability "
                "that all words get in equal parts"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap ({self.softcap}) must be greater than 0, or None for no cap")


@dataclass(frozen=True)
class TokenParts:
    """Of each token: sum exp(logit - maximum), the target's and the mean logit less the maximum, and that.

    They are apart since adding a large maximum to a logarithm would lose the digits of a small loss. For an ignored
    token they are 1, 0, 0, 0; mean_logit is 0 where nobody asked for it. Gradients take the maximum for a constant.
    """

    total: Tensor
    target_logit: Tensor
    mean_logit: Tensor
    maximum: Tensor


def parts_of(state: Tensor, counted: Tensor, vocabulary_size: int, needs_sum: bool) -> tuple[Tensor, ...]:
    """TokenParts, as a tuple, from statistics [4, T]."""
    maximum, total, target_logit, logit_sum = state.unbind()
    mean = logit_sum / max(1, vocabulary_size) - maximum if needs_sum else logit_sum
    total, target_logit = torch.where(counted, total, 1.0), torch.where(counted, target_logit - maximum, 0.0)
    return total, target_logit, torch.where(counted, mean, 0.0), torch.where(counted, maximum, 0.0)


def token_loss(parts: TokenParts, label_smoothing: float, z_loss: float) -> Tensor:
    """The loss of each token, before its weight."""
    log_total = parts.total.log()
    loss = log_total - (1 - label_smoothing) * parts.target_logit
    if label_smoothing:
        loss = loss - label_smoothing * parts.mean_logit
    if z_loss:
        loss = loss + z_loss * (log_total + parts.maximum).square()
    return loss


@dataclass(frozen=True)
class TokenWeights:
    """What each token's loss [T] is multiplied by, 0 if ignored, and what the sum of all is divided by, a scalar.

    They are apart: were each token's factor rounded, so would be the mean.
    """

    each: Tensor
    divisor: Tensor

    def total(self, loss: Tensor) -> Tensor:
        """Of the losses of the tokens [T]; added in fp64, which costs nothing beside the logits."""
        return (loss * self.each).sum(dtype=torch.float64).div(self.divisor).to(loss.dtype)


def coefficients_of_loss(
    weights: TokenWeights, label_smoothing: float, z_loss: float, vocabulary_size: int
) -> CoefficientsOf:
    """The gradient of weights.total(token_loss) with respect to the logits."""

    def coefficients(state: Tensor, rows: Tensor | slice) -> Coefficients:
        maximum, total, weight = state[0], state[1], weights.each[rows] / weights.divisor
        share = weight if not z_loss else weight * (1 + 2 * z_loss * (total.log() + maximum))
        each = -label_smoothing / vocabulary_size * weight if label_smoothing else None
        return Coefficients(maximum, share / total, (label_smoothing - 1) * weight, each)

    return coefficients


def coefficients_of_parts(
    dtotal: Tensor, dtarget_logit: Tensor, dmean_logit: Tensor | None, vocabulary_size: int
) -> CoefficientsOf:
    """The gradient of TokenParts by those of its members [T], which are 0 for ignored tokens."""

    def coefficients(state: Tensor, rows: Tensor | slice) -> Coefficients:
        each = None if dmean_logit is None else dmean_logit[rows] / vocabulary_size
        return Coefficients(state[0], dtotal[rows].contiguous(), dtarget_logit[rows].contiguous(), each)

    return coefficients


def token_weights_of(
    target: Tensor, token_weights: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> TokenWeights:
    """A mean is divided by the sum of the weights of tokens that are not ignored, where that is not 0."""
    counted = target != options.ignore_index
    weights = counted.to(dtype)
    if token_weights is not None:
        weights = torch.where(counted, token_weights.to(dtype), 0.0)
    total = weights.sum() if options.reduction == "mean" else weights.new_ones(())
    return TokenWeights(weights, torch.where(total == 0, 1.0, total))


def check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weights: Tensor | None
) -> None:
    """ValueError where shapes or dtypes do not fit."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [..., H] and weight {tuple(weight.shape)} [V, H], with the same H; "
            "weight has one row a word, as torch.nn.Linear(H, V) and torch.nn.Embedding(V, H) have it"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}, and they must have one floating-point dtype; convert "
            "one of them"
        )
    if not weight.shape[0]:
        raise ValueError("weight has no rows, so that there is no word; give it one row a word")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias {tuple(bias.shape)} {bias.dtype} must be [V] = {tuple(weight.shape[:1])} in floating point, one "
            "value a row of weight"
        )
    check_targets(target, "hidden", hidden)
    if token_weights is not None and (
        token_weights.shape != target.shape or not token_weights.is_floating_point()
    ):
        raise ValueError(
            f"token_weights {tuple(token_weights.shape)} {token_weights.dtype} must have the shape of target "
            f"{tuple(target.shape)}, in floating point: one factor a token"
        )
