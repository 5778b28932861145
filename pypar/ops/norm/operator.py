"""rms_norm and layer_norm as operators of torch: schema, fake and gradient; and as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pypar.ops.backend import Backend
from pypar.ops.norm.backends import backends_of
from pypar.ops.norm.definition import Backward, Forward
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, str backend)"
)
_BACKWARD = (
    "(Tensor dout, Tensor? dsum, Tensor x, Tensor? weight, bool has_bias, Tensor mean, Tensor rstd, "
    "float weight_offset, str backend)"
)


def register_norm(op: str, center: bool) -> tuple[tuple[Backend, ...], Callable[..., Forward]]:
    """(the backends of `op`, pypar::<op>_forward) with pypar::<op>_backward as its derivative."""

    backends = backends_of(op, center)

    def fake_forward(x: Tensor, residual: Tensor | None, *_: Any) -> Forward:
        stats = accumulate_dtype(x)
        return (
            x.new_empty(x.shape),
            x.new_empty((0,) if residual is None else x.shape),
            x.new_empty(x.shape[:-1] if center else (0,), dtype=stats),
            x.new_empty(x.shape[:-1], dtype=stats),
        )

    def fake_backward(
        dout: Tensor,
        dsum: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        has_bias: bool,
        mean: Tensor,
        *_: Any,
    ) -> Backward:
        D = x.shape[-1]
        dweight, dbias = (mean.new_empty(D if there else 0) for there in (weight is not None, has_bias))
        return x.new_empty(x.shape), dweight, dbias

    def save(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        x, residual, weight, bias, _, ctx.weight_offset, ctx.backend = inputs
        _, total, mean, rstd = output
        ctx.has_residual, ctx.bias_dtype = residual is not None, None if bias is None else bias.dtype
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.set_materialize_grads(False)  # the last sum of a model is used by nobody

    def gradient(ctx: Any, dout: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        dsum = dsum if ctx.has_residual else None
        if dout is None:
            return dsum, dsum, None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = backward(
            dout, dsum, x, weight, ctx.bias_dtype is not None, mean, rstd, ctx.weight_offset, ctx.backend
        )
        return (
            dx,
            dx if ctx.has_residual else None,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
            None,
            None,
        )

    forward = register(
        op, "forward", f"{_FORWARD} -> (Tensor, Tensor, Tensor, Tensor)", backends, fake_forward
    )
    backward = register(op, "backward", f"{_BACKWARD} -> (Tensor, Tensor, Tensor)", backends, fake_backward)
    register_gradient(op, gradient, save)
    return backends, forward


def of_last_dims(
    norm: Callable[..., Any],
    shape: tuple[int, ...],
    x: Tensor,
    residual: Tensor | None,
    *vectors: Tensor | None,
    **options: Any,
) -> Any:
    """norm(x, *vectors, residual=residual) over the last dimensions, which `shape` names, taken as one.

    ValueError where x does not end with these dimensions.
    """
    if tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise ValueError(f"x {tuple(x.shape)} must end with normalized_shape {shape}; reshape it")
    if len(shape) == 1:
        return norm(x, *vectors, residual=residual, **options)
    flat = [None if y is None else y.flatten(-len(shape)) for y in (x, *vectors)]
    flat_residual = None if residual is None else residual.flatten(-len(shape))
    found = norm(*flat, residual=flat_residual, **options)
    if residual is None:
        return found.view(x.shape)
    return tuple(y.view(x.shape) for y in found)
