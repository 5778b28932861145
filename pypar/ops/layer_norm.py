"""Layer normalisation (Ba, Kiros and Hinton, arXiv 1607.06450)."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, nn

from pypar.ops.norm.operator import AroundOffset, of_last_dims, register_norm

BACKENDS, _normalise = register_norm("layer_norm", center=True)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) * (weight + weight_offset) + bias, computed in fp32 and rounded once.

    Mean and variance are of the last dimension, the variance of what is left when the mean is taken off. With a
    residual, x + residual, rounded to x's dtype, is normalised, and (out, x + residual) is returned.

    x: [..., D], any strides; weight, bias: [D], each of x's dtype or float32, or None for ones and zeros;
    weight_offset: 1.0 for weights that are kept around zero; residual: like x. Returns [..., D] of x's dtype,
    contiguous, once or twice.
    ValueError: operands that do not fit together, eps that is not positive, a backend that refuses.
    """
    return _normalise(x, residual, weight, bias, eps, weight_offset, backend)


class LayerNorm(AroundOffset, nn.LayerNorm):
    """torch.nn.LayerNorm by `layer_norm`, with its arguments and its state_dict.

    weight_offset: added to the weight, whose first value is 1 - weight_offset.
    """

    computes_as = nn.LayerNorm  # what pypar.parallel asks of a subclass

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x [..., *normalized_shape] -> out, or, with a residual, (out, x + residual)."""
        options = {"eps": self.eps, "weight_offset": self.weight_offset}
        return of_last_dims(layer_norm, self.normalized_shape, x, residual, self.weight, self.bias, **options)
