"""linear_cross_entropy as operators of torch: backends, schemas, fakes and gradients.

`parts` gives the numbers of each token of which any loss is made, and its gradient multiplies the logits again (four
products in all). `with_gradients` gives a sum over tokens, and finds the gradients while the logits are there (three):
that is right where one number multiplies all of them in the end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pypar.ops.backend import never_refuses
from pypar.ops.cross_entropy import check_range
from pypar.ops.linear_cross_entropy import rows
from pypar.ops.linear_cross_entropy.chunks import LossProblem, Needs, rows_of_a_chunk
from pypar.ops.linear_cross_entropy.loss import (
    TokenParts,
    TokenWeights,
    coefficients_of_loss,
    coefficients_of_parts,
    parts_of,
    token_loss,
)
from pypar.ops.linear_cross_entropy.passes import differentiate_all, measure_all, measure_and_differentiate
from pypar.ops.linear_cross_entropy.rows import LossBackend
from pypar.ops.register import define, register_gradient
from pypar.ops.rows import accumulate_dtype, as_rows, native_refusal

# A block of the weight in fp32: with the logits of a chunk it stays in a cache of the third level.
_BLOCK_BYTES = 16 << 20


class LossInputs(NamedTuple):
    """What is differentiated, and by whose targets; see `linear_cross_entropy`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    softcap: float
    needs_mean: bool  # the mean logit is wanted, of which label smoothing is made

    def problem(self, backend: LossBackend) -> LossProblem:
        """The problem of one who has the whole vocabulary. ValueError on CPU: a target out of range."""
        hidden, target, vocabulary_size = as_rows(self.hidden), self.target.reshape(-1), self.weight.shape[0]
        counted: Tensor | None = target != self.ignore_index
        if target.device.type == "cpu":
            check_range(target, vocabulary_size, self.ignore_index)
            counted = None if bool(torch.all(counted)) else counted  # type: ignore[arg-type]
        chunk_rows = rows_of_a_chunk(hidden.shape[0], hidden.shape[1], vocabulary_size)
        return LossProblem(
            hidden,
            self.weight,
            self.bias,
            target,
            counted,
            self.softcap,
            backend,
            chunk_rows,
            self.needs_mean,
        )

    def parts(self, state: Tensor) -> tuple[Tensor, ...]:
        """TokenParts of statistics [4, T], in the shape of target."""
        counted = self.target.reshape(-1) != self.ignore_index
        parts = parts_of(state, counted, self.weight.shape[0], self.needs_mean)
        return tuple(x.view(self.target.shape) for x in parts)


def _parts(backend: LossBackend, *inputs: Any) -> tuple[Tensor, ...]:
    given = LossInputs(*inputs)
    return given.parts(measure_all(given.problem(backend), None))


def _parts_backward(
    backend: LossBackend,
    dtotal: Tensor,
    dtarget_logit: Tensor,
    dmean_logit: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    total: Tensor,
    maximum: Tensor,
    *options_and_needs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, needs = options_and_needs
    given = LossInputs(hidden, weight, bias, target, *options)
    problem = given.problem(backend)
    counted = problem.targets != given.ignore_index
    dparts = [torch.where(counted, x.reshape(-1), 0.0) for x in (dtotal, dtarget_logit, dmean_logit)]
    coefficients = coefficients_of_parts(
        dparts[0], dparts[1], dparts[2] if given.needs_mean else None, weight.shape[0]
    )
    state = torch.stack((maximum.reshape(-1), total.reshape(-1)))
    return _shaped(differentiate_all(problem, None, coefficients, state, needs), hidden, needs)


def _with_gradients(
    backend: LossBackend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weights: Tensor,
    divisor: Tensor,
    *options_and_needs: Any,
) -> tuple[Tensor, ...]:
    """(sum of token_weights x the loss of each token / divisor, TokenParts, gradients of that quotient)."""
    ignore_index, softcap, label_smoothing, z_loss, needs = options_and_needs
    given = LossInputs(hidden, weight, bias, target, ignore_index, softcap, label_smoothing != 0)
    flat = TokenWeights(token_weights.reshape(-1), divisor)
    coefficients = coefficients_of_loss(flat, label_smoothing, z_loss, weight.shape[0])
    state, gradients = measure_and_differentiate(given.problem(backend), None, coefficients, needs)
    parts = given.parts(state)
    loss = TokenWeights(token_weights, divisor).total(token_loss(TokenParts(*parts), label_smoothing, z_loss))
    return loss, *parts, *_shaped(gradients, hidden, needs)


def _shaped(gradients: Any, hidden: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    dhidden = gradients.hidden.view(hidden.shape) if needs[0] else gradients.hidden
    return dhidden, gradients.weight, gradients.bias


def _scaled(dloss: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple((x * dloss).to(x.dtype) for x in gradients)


def _native_unsupported(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
) -> str | None:
    return native_refusal(hidden, weight, target, *(() if bias is None else (bias,)))


def _backend(name: str, refuses: Any, statistics: Any, gradient: Any, block_bytes: int | None) -> LossBackend:
    """forward and backward are the operators' functions, with the backend itself as their first argument."""
    return LossBackend(name, _parts, _parts_backward, refuses, statistics, gradient, block_bytes)


BACKENDS = (
    _backend("native", _native_unsupported, rows.native_statistics, rows.native_gradient, _BLOCK_BYTES),
    _backend("reference", never_refuses, rows.plain_statistics, rows.plain_gradient, None),
)
BY_NAME = {backend.name: backend for backend in BACKENDS}


def _by_name(function: Any) -> Any:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return function(BY_NAME[arguments[-1]], *arguments[:-1])

    return run


# ---- schemas, fakes


def _fake_parts(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *_: Any) -> tuple:
    return tuple(hidden.new_empty(target.shape, dtype=accumulate_dtype(hidden)) for _ in range(4))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple:
    none = hidden.new_empty(0)
    return (
        hidden.new_empty(hidden.shape) if needs[0] else none,
        weight.new_empty(weight.shape) if needs[1] else hidden.new_empty(0),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def _fake_parts_backward(dtotal: Tensor, _dtarget: Tensor, _dmean: Tensor, *inputs: Any) -> tuple:
    return _fake_gradients(inputs[0], inputs[1], inputs[2], inputs[-2])


def _fake_with_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple:
    loss = hidden.new_empty((), dtype=accumulate_dtype(hidden))
    return (
        loss,
        *_fake_parts(hidden, weight, bias, rest[0]),
        *_fake_gradients(hidden, weight, bias, rest[-2]),
    )


def _fake_scaled(dloss: Tensor, *gradients: Tensor) -> tuple:
    return tuple(x.new_empty(x.shape) for x in gradients)


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_NEEDS = "bool[3] needs, str backend"
_THREE = "Tensor, Tensor, Tensor"
parts = define(
    "linear_cross_entropy_forward",
    f"({_INPUTS}, int ignore_index, float softcap, bool needs_mean, str backend) -> ({_THREE}, Tensor)",
    _by_name(_parts),
    _fake_parts,
)
parts_backward = define(
    "linear_cross_entropy_backward",
    f"(Tensor dtotal, Tensor dtarget_logit, Tensor dmean_logit, {_INPUTS}, Tensor total, Tensor maximum, "
    f"int ignore_index, float softcap, bool needs_mean, {_NEEDS}) -> ({_THREE})",
    _by_name(_parts_backward),
    _fake_parts_backward,
)
with_gradients = define(
    "linear_cross_entropy_with_gradients",
    f"({_INPUTS}, Tensor token_weights, Tensor divisor, int ignore_index, float softcap, "
    f"float label_smoothing, float z_loss, {_NEEDS}) -> ({_THREE}, {_THREE}, Tensor, Tensor)",
    _by_name(_with_gradients),
    _fake_with_gradients,
)
scaled = define(
    "linear_cross_entropy_scaled",
    f"(Tensor dloss, Tensor dhidden, Tensor dweight, Tensor dbias) -> ({_THREE})",
    _scaled,
    _fake_scaled,
)


# ---- gradients


def _save_parts(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, bias, target, *ctx.options = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(hidden, weight, bias, target, output[0], output[3])


def _gradient_of_parts(ctx: Any, dtotal: Tensor, dtarget_logit: Tensor, dmean_logit: Tensor, _: Any) -> tuple:
    *options, backend = ctx.options
    needs = [bool(x) for x in ctx.needs_input_grad[:3]]
    found = parts_backward(dtotal, dtarget_logit, dmean_logit, *ctx.saved_tensors, *options, needs, backend)
    return *_asked(found, needs), *(None,) * 5


def _asked(gradients: Any, needs: Any) -> tuple[Tensor | None, ...]:
    return tuple(x if needed else None for x, needed in zip(gradients, needs, strict=True))


def _save_with_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index, ctx.softcap, ctx.label_smoothing, ctx.z_loss, _, ctx.backend = inputs
    _, total, _, _, maximum, *gradients = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # as zeros, those of the gradients would take as much memory as they do
    # Plain tensors are given away by the first backward, scaled in place. What torch.compile traces is not.
    is_plain = all(type(x) is Tensor for x in gradients) and not torch._C._len_torch_dispatch_stack()
    ctx.found = gradients if is_plain else None
    ctx.is_traced = not is_plain
    ctx.save_for_backward(*tensors, total, maximum, *(() if is_plain else gradients))


def _gradient_of_with_gradients(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = [bool(x) for x in ctx.needs_input_grad[:3]]
    rest = (None,) * 9
    if ctx.is_traced and not torch.is_grad_enabled():
        return *_asked(scaled(dloss, *ctx.saved_tensors[8:]), needs), *rest
    found = None if torch.is_grad_enabled() else given_away(ctx, dloss)
    return *_asked(_computed_again(ctx, dloss, needs) if found is None else found, needs), *rest


def given_away(ctx: Any, dloss: Tensor) -> list[Tensor] | None:
    """ctx.found, the gradients that forward has found, times dloss, in place; None where they have been given before.

    A factor of 1, which a call of backward() on the loss itself gives, costs nothing.
    """
    found, ctx.found = ctx.found, None
    if found is None:
        return None
    # As a number of Python it is not rounded to bf16 first. Nobody waits for a GPU.
    factor = float(dloss) if dloss.device.type == "cpu" else dloss
    if not isinstance(factor, float) or factor != 1:
        for x in found:
            x.mul_(factor)
    return found


def _computed_again(ctx: Any, dloss: Tensor, needs: list[bool]) -> Any:
    """For a second backward, and where the gradient is to be differentiated itself, which is refused then."""
    target, token_weights, divisor, total, maximum = ctx.saved_tensors[3:8]
    smoothing, z_loss = ctx.label_smoothing, ctx.z_loss
    each = token_weights.reshape(target.shape) / divisor * dloss
    of_log_total = each * (1 + 2 * z_loss * (total.log() + maximum)) if z_loss else each
    dparts = (of_log_total / total, (smoothing - 1) * each, -smoothing * each)
    options = (ctx.ignore_index, ctx.softcap, smoothing != 0)
    return parts_backward(*dparts, *ctx.saved_tensors[:4], total, maximum, *options, needs, ctx.backend)


register_gradient("linear_cross_entropy", _gradient_of_parts, _save_parts)
register_gradient("linear_cross_entropy", _gradient_of_with_gradients, _save_with_gradients, "with_gradients")
