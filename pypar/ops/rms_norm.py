"""Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from pypar.ops.norm.operator import AroundOffset, of_last_dims, register_norm

BACKENDS, _normalise = register_norm("rms_norm", center=False)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2, last dim) + eps) * (weight + weight_offset), computed in fp32 and rounded once.

    With a residual, x + residual, rounded to x's dtype, is normalised, and (out, x + residual) is returned: the norm
    and the residual stream that goes on, in one pass.

    x: [..., D], any strides; weight: [D], of x's dtype or float32, or None for ones; weight_offset: 1.0 for weights
    that are kept around zero (Gemma); residual: like x. Returns [..., D] of x's dtype, contiguous, once or twice.
    ValueError: operands that do not fit together, eps that is not positive, a backend that refuses.
    """
    return _normalise(x, residual, weight, None, eps, weight_offset, backend)


class RMSNorm(AroundOffset, nn.RMSNorm):
    """torch.nn.RMSNorm by `rms_norm`, with its arguments and its state_dict.

    weight_offset: added to the weight, whose first value is 1 - weight_offset.
    """

    computes_as = nn.RMSNorm  # what pypar.parallel asks of a subclass

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x [..., *normalized_shape] -> out, or, with a residual, (out, x + residual)."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return of_last_dims(
            rms_norm,
            self.normalized_shape,
            x,
            residual,
            self.weight,
            eps=eps,
            weight_offset=self.weight_offset,
        )
