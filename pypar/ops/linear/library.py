"""What a library that multiplies matrices is to `pypar.ops.linear`: three products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pypar.ops.backend import Backend

_MIN_FEATURES = 16


@dataclass(frozen=True)
class LinearBackend(Backend):
    """A backend whose backward comes in two parts, since layers need one without the other."""

    input_gradient: Callable
    weight_gradient: Callable


def from_product(
    name: str,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    unsupported: Callable[..., str | None],
) -> LinearBackend:
    """The backend of a function (a [M, K], b [O, K], bias [O] or None) -> a @ b.T + bias."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _unflatten(product(x.reshape(-1, x.shape[-1]), weight, bias), x.shape[:-1])

    def input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
        return _unflatten(product(dout.reshape(-1, dout.shape[-1]), weight.t(), None), dout.shape[:-1])

    def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
        return product(dout.reshape(-1, dout.shape[-1]).t(), x.reshape(-1, x.shape[-1]).t(), None)

    return linear_backend(name, forward, input_gradient, weight_gradient, unsupported)


def linear_backend(
    name: str,
    forward: Callable[..., Tensor],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
    weight_gradient: Callable[[Tensor, Tensor], Tensor],
    unsupported: Callable[..., str | None],
) -> LinearBackend:
    """The backend of three functions."""

    def backward(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return input_gradient(dout, weight), weight_gradient(dout, x)

    return LinearBackend(name, forward, backward, unsupported, input_gradient, weight_gradient)


def no_gain(x: Tensor, in_features: int, out_features: int, *, min_rows: int = 1) -> str | None:
    """Why torch's own product is the better one whatever the processor; None where it may not be."""
    if forward_ad._current_level >= 0:
        return "torch's own product has a derivative in forward mode (torch.func.jvp), and this one has none"
    rows = x.numel() // max(1, x.shape[-1])
    if rows < min_rows or min(in_features, out_features) < _MIN_FEATURES:
        return f"there is nothing to gain below {min_rows} rows or {_MIN_FEATURES} features"
    return None


def _unflatten(result: Tensor, leading: torch.Size) -> Tensor:
    """[rows, features] as [*leading, features]: to autograd a tensor of its own, not a view, as torch's results are."""
    return torch.ops.aten._unsafe_view(result, (*leading, result.shape[-1]))
