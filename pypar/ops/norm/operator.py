"""rms_norm and layer_norm as operators of torch: schema, fake and gradient; and as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pypar.ops.backend import Backend, choose
from pypar.ops.norm.backends import backends_of
from pypar.ops.norm.definition import NormGradients, NormInputs, NormOutputs, NormSaved, check
from pypar.ops.register import define, register_gradient
from pypar.ops.rows import accumulate_dtype

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, str backend)"
)
_BACKWARD = (
    "(Tensor dout, Tensor? dsum, Tensor x, Tensor? weight, bool has_bias, Tensor mean, Tensor rstd, "
    "float weight_offset, str backend)"
)


def register_norm(op: str, center: bool) -> tuple[tuple[Backend, ...], Callable[..., Any]]:
    """(the backends of `op`, what `rms_norm` and `layer_norm` do with their arguments), after defining the operators.

    Those are pypar::<op>_forward and, as its derivative, pypar::<op>_backward.
    """
    backends = backends_of(op, center)
    by_name = {backend.name: backend for backend in backends}

    def run_forward(*arguments: Any) -> NormOutputs:
        return by_name[arguments[-1]].forward(NormInputs(*arguments[:-1]))

    def run_backward(*arguments: Any) -> NormGradients:
        backend = by_name[arguments[-1]].backward
        assert backend is not None
        return backend(NormSaved(*arguments[:-1]))

    def fake_forward(*arguments: Any) -> NormOutputs:
        given = NormInputs(*arguments[:-1])
        x, stats = given.x, accumulate_dtype(given.x)
        return NormOutputs(
            x.new_empty(x.shape),
            x.new_empty((0,) if given.residual is None else x.shape),
            x.new_empty(x.shape[:-1] if center else (0,), dtype=stats),
            x.new_empty(x.shape[:-1], dtype=stats),
        )

    def fake_backward(*arguments: Any) -> NormGradients:
        saved = NormSaved(*arguments[:-1])
        D = saved.x.shape[-1]
        dweight, dbias = (
            saved.mean.new_empty(D if there else 0) for there in (saved.weight is not None, saved.has_bias)
        )
        return NormGradients(saved.x.new_empty(saved.x.shape), dweight, dbias)

    def save(ctx: Any, inputs: tuple[Any, ...], output: NormOutputs) -> None:
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

    forward = define(
        f"{op}_forward", f"{_FORWARD} -> (Tensor, Tensor, Tensor, Tensor)", run_forward, fake_forward
    )
    backward = define(
        f"{op}_backward", f"{_BACKWARD} -> (Tensor, Tensor, Tensor)", run_backward, fake_backward
    )
    register_gradient(op, gradient, save)

    def normalise(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        requested: str | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check(x, residual, eps, weight=weight, bias=bias)
        operands = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        backend = choose(op, backends, operands, requested).name
        out, total, _, _ = forward(x, residual, weight, bias, eps, weight_offset, backend)
        return out if residual is None else (out, total)

    return backends, normalise


class AroundOffset(nn.Module):
    """What `RMSNorm` and `LayerNorm` add to torch's modules: a weight that is kept around 1 - weight_offset."""

    def __init__(self, *args: Any, weight_offset: float = 0.0, **kwargs: Any) -> None:
        self.weight_offset = weight_offset  # reset_parameters, which super().__init__ calls, reads it
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        weight = self._parameters["weight"]
        if weight is not None:
            nn.init.constant_(weight, 1 - self.weight_offset)


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
