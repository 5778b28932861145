"""The loss of a vocabulary of which each rank of an axis has a part; no rank has logits of more than a chunk.

Each rank multiplies a chunk of tokens with its words. Four numbers a token travel (the greatest logit, the sum of
exponentials, the target's logit, the sum of logits) in one all-gather a chunk, while the next chunk is multiplied; the
sum of hidden's gradient over the ranks is one all-reduce a chunk, while the next one is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pypar.comm import Handle, all_gather_start, all_reduce_start
from pypar.mesh import Axis
from pypar.ops.backend import choose
from pypar.ops.cross_entropy import check_range
from pypar.ops.linear_cross_entropy import BACKENDS, compute
from pypar.ops.linear_cross_entropy.backends import BY_NAME
from pypar.ops.linear_cross_entropy.chunks import Gradients, LossProblem, Needs, rows_of_a_chunk
from pypar.ops.linear_cross_entropy.loss import (
    LossKeywords,
    LossOptions,
    TokenParts,
    TokenWeights,
    check,
    coefficients_of_loss,
    coefficients_of_parts,
    parts_of,
    token_loss,
)
from pypar.ops.linear_cross_entropy.operator import given_away
from pypar.ops.linear_cross_entropy.passes import (
    CoefficientsOf,
    differentiate_all,
    measure_all,
    measure_and_differentiate,
)
from pypar.ops.linear_cross_entropy.rows import LossBackend
from pypar.ops.rows import as_rows
from pypar.ops.uncompiled import between_ranks, uncompiled

if TYPE_CHECKING:
    from typing_extensions import Unpack


@between_ranks("the loss of a vocabulary over a group")
def loss_of_parts(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    axis: Axis,
    sizes: list[int],
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> Any:
    """`linear_cross_entropy` of ranks that agree: sizes, of the words of each, and all else but the words are the same.

    A layer that was cut knows that much, so that the ranks need not ask each other.
    """
    chosen = LossOptions(**options)
    check(hidden, weight, target, bias, token_weights)
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    name = choose("linear_cross_entropy", BACKENDS, arguments, backend).name
    check_range(target, sum(sizes), chosen.ignore_index)
    return compute(_Part(BY_NAME[name], axis, sizes), hidden, weight, target, bias, token_weights, chosen)


@dataclass(frozen=True)
class _Part:
    """This rank's words among those of the others: how `compute` gets its numbers."""

    backend: LossBackend
    axis: Axis
    sizes: list[int]

    def parts(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        ignore_index, softcap, needs_mean = options
        return _Parts.apply(hidden, weight, bias, _Call(self, target, ignore_index, softcap, needs_mean))

    def with_gradients(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        each, divisor, ignore_index, softcap, smoothing, z_loss, needs = options
        weights = TokenWeights(each.reshape(-1), divisor)
        call = _Call(self, target, ignore_index, softcap, smoothing != 0)
        return _WithGradients.apply(hidden, weight, bias, call, weights, smoothing, z_loss, tuple(needs))

    def join_start(self, state: Tensor) -> _Joining:
        return _Joining(all_gather_start(state.unsqueeze(0), self.axis))

    def sum_start(self, x: Tensor) -> Handle:
        return all_reduce_start(x, self.axis)


@dataclass(frozen=True)
class _Joining:
    handle: Handle

    def wait(self) -> Tensor:
        """The statistics of all words from those of the ranks [R, 4, n], the same on every rank."""
        maximum, total, target_logit, logit_sum = self.handle.wait().unbind(1)
        maximum = torch.where(total == 0, -torch.inf, maximum)  # who has nothing but -inf has no say
        greatest = maximum.amax(0)
        greatest = torch.where(greatest == -torch.inf, 0.0, greatest)
        joined = (
            greatest,
            (total * (maximum - greatest).exp()).sum(0),
            target_logit.sum(0),
            logit_sum.sum(0),
        )
        return torch.stack(joined)


@dataclass(frozen=True)
class _Call:
    """What a call of the loss is about, beside hidden, weight and bias."""

    part: _Part
    target: Tensor
    ignore_index: int
    softcap: float
    needs_mean: bool

    @property
    def num_words(self) -> int:
        return sum(self.part.sizes)

    @property
    def counted(self) -> Tensor:
        """[T]: which tokens take part."""
        return self.target.reshape(-1) != self.ignore_index

    def problem(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossProblem:
        rows, counted, sizes = as_rows(hidden), self.counted, self.part.sizes
        first = sum(sizes[: self.part.axis.rank])
        targets = torch.where(counted, self.target.reshape(-1) - first, -1)
        all_counted = counted.device.type == "cpu" and bool(counted.all())
        T, H = rows.shape
        chunk_rows = rows_of_a_chunk(T, H, max(sizes), self.part.backend.chunk_rows)
        return LossProblem(
            rows,
            weight,
            bias,
            targets,
            None if all_counted else counted,
            self.softcap,
            self.part.backend,
            chunk_rows,
            self.needs_mean,
        )

    def found(self, state: Tensor) -> tuple[Tensor, ...]:
        """TokenParts of statistics, in the shape of target."""
        parts = parts_of(state, self.counted, self.num_words, self.needs_mean)
        return tuple(x.view(self.target.shape) for x in parts)


class _Parts(Function):
    """`operator.parts` over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        found = call.found(measure_all(call.problem(hidden, weight, bias), call.part))
        ctx.mark_non_differentiable(found[3])
        ctx.save_for_backward(hidden, weight, bias, found[0], found[3])
        return found

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, *dparts: Tensor) -> tuple[Any, ...]:
        call, needs = ctx.call, tuple(ctx.needs_input_grad[:3])
        dtotal, dtarget_logit, dmean = (torch.where(call.counted, x.reshape(-1), 0.0) for x in dparts[:3])
        coefficients = coefficients_of_parts(
            dtotal, dtarget_logit, dmean if call.needs_mean else None, call.num_words
        )
        gradients = _differentiated(ctx, call, coefficients, needs)
        return *_asked(gradients, ctx.saved_tensors[0], needs), None


class _WithGradients(Function):
    """`operator.with_gradients` over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, *options: Any
    ) -> tuple[Tensor, ...]:
        weights, smoothing, z_loss, ctx.needs = options
        ctx.call = call
        ctx.coefficients = coefficients_of_loss(weights, smoothing, z_loss, call.num_words)
        problem = call.problem(hidden, weight, bias)
        state, gradients = measure_and_differentiate(problem, call.part, ctx.coefficients, ctx.needs)
        ctx.found = [gradients.hidden, gradients.weight, gradients.bias]
        found = call.found(state)
        loss = weights.total(token_loss(TokenParts(*(x.view(-1) for x in found)), smoothing, z_loss))
        ctx.mark_non_differentiable(*found)
        ctx.save_for_backward(hidden, weight, bias, found[0], found[3])
        return loss, *found

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden = ctx.saved_tensors[0]  # torch's error where they were freed
        if ctx.found is None:
            again = _differentiated(ctx, ctx.call, ctx.coefficients, ctx.needs)
            ctx.found = [again.hidden, again.weight, again.bias]
        found = given_away(ctx, dloss)
        assert found is not None
        return *_asked(Gradients(*found), hidden, ctx.needs), *(None,) * 5


def _differentiated(ctx: Any, call: _Call, coefficients: CoefficientsOf, needs: Needs) -> Gradients:
    """From saved statistics; the logits are multiplied again."""
    hidden, weight, bias, total, maximum = ctx.saved_tensors
    state = torch.stack((maximum.reshape(-1), total.reshape(-1)))
    return differentiate_all(call.problem(hidden, weight, bias), call.part, coefficients, state, needs)


def _asked(found: Gradients, hidden: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    return (
        found.hidden.view(hidden.shape) if needs[0] else None,
        found.weight if needs[1] else None,
        found.bias if needs[2] else None,
    )
