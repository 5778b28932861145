"""moe_permute and moe_combine as operators of torch: schemas, fakes and gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pypar.ops.moe_permute.backends import BACKENDS
from pypar.ops.moe_permute.definition import Order
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype


def _fake_order(experts: Tensor, num_experts: int, backend: str) -> Order:
    return (
        experts.new_empty(num_experts),
        experts.new_empty(experts.shape),
        experts.new_empty(experts.numel()),
    )


def _fake_forward(x: Tensor, places: Tensor, backend: str) -> Tensor:
    return x.new_empty(places.numel(), x.shape[1])


def _fake_backward(drows: Tensor, places: Tensor, backend: str) -> Tensor:
    return drows.new_empty(places.shape[0], drows.shape[1])


def _fake_combine_forward(rows: Tensor, places: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1])


def _fake_combine_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    dweights = dout.new_empty((0,) if rows is None else places.shape, dtype=accumulate_dtype(dout))
    return dout.new_empty(places.numel(), dout.shape[1]), dweights


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, places, ctx.backend = inputs
    ctx.save_for_backward(places)


def _gradient(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    return backward(drows, *ctx.saved_tensors, ctx.backend), None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, places, weights, ctx.backend = inputs
    ctx.save_for_backward(None if weights is None else rows, places, weights)


def _gradient_of_combine(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, places, weights = ctx.saved_tensors
    _, _, weights_needed, _ = ctx.needs_input_grad
    drows, dweights = combine_backward(dout, rows if weights_needed else None, places, weights, ctx.backend)
    return drows, None, dweights.to(weights.dtype) if weights_needed else None, None


_OF_COMBINE = "Tensor places, Tensor? weights, str backend"
order = register(
    "moe_permute",
    "order",
    "(Tensor experts, int num_experts, str backend) -> (Tensor, Tensor, Tensor)",
    BACKENDS,
    _fake_order,
)
forward = register(
    "moe_permute", "forward", "(Tensor x, Tensor places, str backend) -> Tensor", BACKENDS, _fake_forward
)
backward = register(
    "moe_permute",
    "backward",
    "(Tensor drows, Tensor places, str backend) -> Tensor",
    BACKENDS,
    _fake_backward,
)
combine_forward = register(
    "moe_permute",
    "combine_forward",
    f"(Tensor rows, {_OF_COMBINE}) -> Tensor",
    BACKENDS,
    _fake_combine_forward,
)
combine_backward = register(
    "moe_permute",
    "combine_backward",
    f"(Tensor dout, Tensor? rows, {_OF_COMBINE}) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_combine_backward,
)
register_gradient("moe_permute", _gradient, _save)
register_gradient("moe_permute", _gradient_of_combine, _save_combine, "combine_forward")
