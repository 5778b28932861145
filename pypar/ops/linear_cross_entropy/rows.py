"""What happens to the logits of one block between the products: in plain PyTorch (the definition), C++ and Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend
from pypar.ops.rows import accumulate_dtype


@dataclass(frozen=True)
class Block:
    """Some tokens' products with some words, and what makes logits of them.

    logits: [n, Vb], the products, or the logits in their place; bias: [Vb] or None; targets: [n], which count from the
    block's first word: a target outside of the block is not there; softcap: 0 for none. All in the dtype of computing.
    """

    logits: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float


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

    statistics(block, state, needs_sum): applies bias and softcap to the block's logits in place and brings state up to
    date: [4, n] fp32, the greatest logit of each row, the sum of exp(logit - greatest), the target's logit and the sum
    of the logits, all zeros before the first block.

    gradient(block, coefficients, is_raw, dtype): the gradient of the products, in the memory of the logits, in the
    dtype of operands. is_raw: the logits are the products, without bias and softcap.

    multiply_into(out, a, b, add=False): out [M, O] = a [M, K] @ b.T of b [O, K], or out += that; out is contiguous and
    in the dtype of computing, a and b may be transposes.

    keeps_operands: products take hidden, weight and the logits' gradient in the dtype of the inputs, instead of copies
    in the dtype of computing.

    block_bytes: how large a block of the weight in fp32 may be; None: a block is the whole vocabulary.
    chunk_rows: the least and the most tokens of a chunk.
    """

    statistics: Callable
    gradient: Callable
    multiply_into: Callable
    keeps_operands: bool
    block_bytes: int | None
    chunk_rows: tuple[int, int]

    def operand_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of operands of products where the inputs are like x."""
        return x.dtype if self.keeps_operands else accumulate_dtype(x)


def plain_statistics(block: Block, state: Tensor, needs_sum: bool) -> None:
    logits = block.logits.copy_(_finished(block))
    maximum = logits.amax(-1)
    state[0] = torch.where(maximum == -torch.inf, 0.0, maximum)
    state[1] = (logits - state[0].unsqueeze(-1)).exp().sum(-1)
    here, places = _places(block)
    state[2] = torch.where(here, logits.gather(-1, places).squeeze(-1), 0.0)
    if needs_sum:
        state[3] = logits.sum(-1)


def plain_gradient(block: Block, of: Coefficients, is_raw: bool, dtype: torch.dtype) -> Tensor:
    value = _finished(block) if is_raw else block.logits
    gradient = (value - of.maximum.unsqueeze(-1)).exp() * of.share.unsqueeze(-1)
    if of.each is not None:
        gradient += of.each.unsqueeze(-1)
    here, places = _places(block)
    gradient.scatter_add_(-1, places, torch.where(here, of.target_share, 0.0).unsqueeze(-1))
    if block.softcap:
        gradient *= 1 - (value / block.softcap).square()
    return block.logits.copy_(gradient)


def _finished(block: Block) -> Tensor:
    logits = block.logits if block.bias is None else block.logits + block.bias
    return block.softcap * torch.tanh(logits / block.softcap) if block.softcap else logits


def _places(block: Block) -> tuple[Tensor, Tensor]:
    """(whether each target is in the block [n], where to look [n, 1])."""
    here = (block.targets >= 0) & (block.targets < block.logits.shape[-1])
    return here, torch.where(here, block.targets, 0).unsqueeze(-1)


def native_statistics(block: Block, state: Tensor, needs_sum: bool) -> None:
    maximum, total, target_logit, logit_sum = state.unbind()
    native.run(
        native.module().linear_cross_entropy_statistics,
        block.logits, 0 if block.bias is None else block.bias, block.targets, maximum, total, target_logit,
        logit_sum if needs_sum else 0, *block.logits.shape, block.softcap, native.num_threads(),
    )  # fmt: skip


def native_gradient(block: Block, of: Coefficients, is_raw: bool, dtype: torch.dtype) -> Tensor:
    native.run(
        native.module().linear_cross_entropy_gradient,
        block.logits, 0 if block.bias is None else block.bias, block.targets, of.maximum, of.share, of.target_share,
        0 if of.each is None else of.each, *block.logits.shape, block.softcap, is_raw, native.num_threads(),
    )  # fmt: skip
    return block.logits


def triton_statistics(block: Block, state: Tensor, needs_sum: bool) -> None:
    from pypar.kernels import linear_cross_entropy

    linear_cross_entropy.statistics(block, state, needs_sum)


def triton_gradient(block: Block, of: Coefficients, is_raw: bool, dtype: torch.dtype) -> Tensor:
    from pypar.kernels import linear_cross_entropy

    each = None if of.each is None else of.each.contiguous()
    coefficients = (of.maximum.contiguous(), of.share.contiguous(), of.target_share.contiguous(), each)
    return linear_cross_entropy.gradient(block, coefficients, is_raw, dtype)
