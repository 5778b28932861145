"""linear_cross_entropy as operators of torch: schemas, fakes and gradients.

`parts` gives the numbers of each token of which any loss is made, and its gradient multiplies the logits again (four
products in all). `with_gradients` gives a sum over tokens, and finds the gradients while the logits are there (three):
that is right where one number multiplies all of them in the end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pypar.ops.linear_cross_entropy import backends
from pypar.ops.linear_cross_entropy.chunks import Needs
from pypar.ops.register import define, register_gradient
from pypar.ops.rows import accumulate_dtype


def _scaled(dloss: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple((x * dloss).to(x.dtype) for x in gradients)


def _by_name(function: Any) -> Any:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return function(backends.BY_NAME[arguments[-1]], *arguments[:-1])

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
    _by_name(backends.parts),
    _fake_parts,
)
parts_backward = define(
    "linear_cross_entropy_backward",
    f"(Tensor dtotal, Tensor dtarget_logit, Tensor dmean_logit, {_INPUTS}, Tensor total, Tensor maximum, "
    f"int ignore_index, float softcap, bool needs_mean, {_NEEDS}) -> ({_THREE})",
    _by_name(backends.parts_backward),
    _fake_parts_backward,
)
with_gradients = define(
    "linear_cross_entropy_with_gradients",
    f"({_INPUTS}, Tensor token_weights, Tensor divisor, int ignore_index, float softcap, "
    f"float label_smoothing, float z_loss, {_NEEDS}) -> ({_THREE}, {_THREE}, Tensor, Tensor)",
    _by_name(backends.with_gradients),
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
