"""What happens to the logits of one block between the products: in plain PyTorch, the definition, and in C++.

A block is [n, Vb]: some tokens' products with some words. `Statistics` are of all blocks of a row so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend


@dataclass(frozen=True)
class Coefficients:
    """The gradient of a row's logits is share * exp(logit - maximum) + each, and target_share more at the target.

    All [n]; each None: 0.
    """

    maximum: Tensor
    share: Tensor
    target_share: Tensor
    each: Tensor | None


@dataclass(frozen=True)
class LossBackend(Backend):
    """A backend of linear_cross_entropy.

    statistics(logits, bias, targets, state, softcap, needs_sum): applies bias and softcap to the logits [n, Vb] in
    place and brings state up to date: [4, n] fp32, the greatest logit of each row, the sum of exp(logit - greatest),
    the target's logit and the sum of the logits, all zeros before the first block. targets [n] count from the block's
    first word; a target outside of the block is not there.

    gradient(logits, bias, targets, coefficients, softcap, is_raw): the logits become the gradient of the products.
    is_raw: the logits are the products, without bias and softcap.

    block_bytes: how large a block of the weight in fp32 may be; None: a block is the whole vocabulary.
    """

    statistics: Callable
    gradient: Callable
    block_bytes: int | None


def plain_statistics(
    logits: Tensor, bias: Tensor | None, targets: Tensor, state: Tensor, softcap: float, needs_sum: bool
) -> None:
    logits.copy_(_finished(logits, bias, softcap))
    maximum = logits.amax(-1)
    state[0] = torch.where(maximum == -torch.inf, 0.0, maximum)
    state[1] = (logits - state[0].unsqueeze(-1)).exp().sum(-1)
    here, places = _places(targets, logits)
    state[2] = torch.where(here, logits.gather(-1, places).squeeze(-1), 0.0)
    if needs_sum:
        state[3] = logits.sum(-1)


def plain_gradient(
    logits: Tensor, bias: Tensor | None, targets: Tensor, of: Coefficients, softcap: float, is_raw: bool
) -> None:
    value = _finished(logits, bias, softcap) if is_raw else logits
    gradient = (value - of.maximum.unsqueeze(-1)).exp() * of.share.unsqueeze(-1)
    if of.each is not None:
        gradient += of.each.unsqueeze(-1)
    here, places = _places(targets, logits)
    gradient.scatter_add_(-1, places, torch.where(here, of.target_share, 0.0).unsqueeze(-1))
    if softcap:
        gradient *= 1 - (value / softcap).square()
    logits.copy_(gradient)


def _finished(products: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    logits = products if bias is None else products + bias
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _places(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(whether each target is in the block [n], where to look [n, 1])."""
    here = (targets >= 0) & (targets < logits.shape[-1])
    return here, torch.where(here, targets, 0).unsqueeze(-1)


def native_statistics(
    logits: Tensor, bias: Tensor | None, targets: Tensor, state: Tensor, softcap: float, needs_sum: bool
) -> None:
    maximum, total, target_logit, logit_sum = state.unbind()
    native.run(
        native.module().linear_cross_entropy_statistics,
        logits, 0 if bias is None else bias, targets, maximum, total, target_logit,
        logit_sum if needs_sum else 0, logits.shape[0], logits.shape[1], softcap, native.num_threads(),
    )  # fmt: skip


def native_gradient(
    logits: Tensor, bias: Tensor | None, targets: Tensor, of: Coefficients, softcap: float, is_raw: bool
) -> None:
    native.run(
        native.module().linear_cross_entropy_gradient,
        logits, 0 if bias is None else bias, targets, of.maximum, of.share, of.target_share,
        0 if of.each is None else of.each, logits.shape[0], logits.shape[1], softcap, is_raw,
        native.num_threads(),
    )  # fmt: skip
