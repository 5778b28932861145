"""Products of groups of rows, each with a matrix of its own: what the experts of a mixture compute.

The gather of tokens before (`moe_permute`) and the gate after (`swiglu`) are calls of their own. In a forward pass of a
mixture 512 wide on one core of a Zen 3, of 8 experts with 128 rows and of 64 with 8 each, in fp32 and bf16, the gather
took 0.1 to 0.5 % of the time, the gate 1.2 to 2.3 %, the products 96 to 98 %. Fused into the products they could save
less than that: backward needs the gate's operands, which would be written all the same, and the gathered rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.grouped_matmul import definition, native
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import native_refusal


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, *, backend: str | None = None) -> Tensor:
    """x[r] @ weight[e].T for the rows r of group e: the first counts[0] rows are group 0's, and so on.

    x: [R, K], any strides; weight: [E, N, K], each matrix as a Linear has it, of x's dtype; matrices kept as [E, K, N]
    are passed as weight.mT, at no cost; counts: [E] int64 on x's device, from 0 to R, as moe_permute returns them.
    Returns [R, N] of x's dtype. Rows past sum(counts) give zeros, and take part in no gradient. Sums are in fp32, those
    of the weights' gradients too. On a GPU the counts are not waited for.
    ValueError: shapes, dtypes or devices that do not fit, on CPU counts that do not fit the rows, a backend that
    refuses.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} must be [R, K] and weight {tuple(weight.shape)} [E, N, K], with one K; matrices "
            "[E, K, N] are passed as weight.mT"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x {x.dtype}; convert one of them")
    if counts.shape != weight.shape[:1] or counts.dtype != torch.int64 or counts.device != x.device:
        raise ValueError(
            f"counts {tuple(counts.shape)} {counts.dtype} on {counts.device} must be [E] = {tuple(weight.shape[:1])}, "
            f"int64, on {x.device} as x; moe_permute returns them"
        )
    chosen = choose("grouped_matmul", BACKENDS, {"x": x, "weight": weight, "counts": counts}, backend)
    return _forward(x, weight, counts, chosen.name)


@dataclass(frozen=True)
class GroupedBackend(Backend):
    """A backend whose backward comes in two parts, since frozen weights need one without the other."""

    input_gradient: Callable
    weight_gradient: Callable


def _native_unsupported(x: Tensor, weight: Tensor, counts: Tensor) -> str | None:
    return native_refusal(x, weight, counts)


def _triton_unsupported(x: Tensor, weight: Tensor, counts: Tensor) -> str | None:
    return triton_refusal(x, weight, counts)


def _triton_forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    from pypar.kernels import grouped_matmul

    return grouped_matmul.rows_product(native.adjacent(x), weight.mT, counts)


def _triton_input_gradient(dout: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    from pypar.kernels import grouped_matmul

    return grouped_matmul.rows_product(native.adjacent(dout), weight, counts)


def _triton_weight_gradient(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    from pypar.kernels import grouped_matmul

    return grouped_matmul.outer_product(
        native.adjacent(dout), native.adjacent(x), torch.empty_like(weight), counts
    )


def _triton_backward(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return _triton_input_gradient(dout, weight, counts), _triton_weight_gradient(dout, x, weight, counts)


BACKENDS = (
    GroupedBackend(
        "native",
        native.forward,
        native.backward,
        _native_unsupported,
        native.input_gradient,
        native.weight_gradient,
    ),
    GroupedBackend(
        "triton",
        _triton_forward,
        _triton_backward,
        _triton_unsupported,
        _triton_input_gradient,
        _triton_weight_gradient,
    ),
    GroupedBackend(
        "reference",
        definition.reference_forward,
        definition.reference_backward,
        never_refuses,
        definition.reference_input_gradient,
        definition.reference_weight_gradient,
    ),
)


def _fake_forward(x: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_input_gradient(dout: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
    return dout.new_empty(dout.shape[0], weight.shape[2])


def _fake_weight_gradient(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, counts, ctx.backend = inputs
    ctx.save_for_backward(x, weight, counts)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    x_needed, weight_needed, _, _ = ctx.needs_input_grad
    dx = _input_gradient(dout, weight, counts, ctx.backend) if x_needed else None
    dweight = _weight_gradient(dout, x, weight, counts, ctx.backend) if weight_needed else None
    return dx, dweight, None, None


_forward = register(
    "grouped_matmul",
    "forward",
    "(Tensor x, Tensor weight, Tensor counts, str backend) -> Tensor",
    BACKENDS,
    _fake_forward,
)
_input_gradient = register(
    "grouped_matmul",
    "input_gradient",
    "(Tensor dout, Tensor weight, Tensor counts, str backend) -> Tensor",
    BACKENDS,
    _fake_input_gradient,
)
_weight_gradient = register(
    "grouped_matmul",
    "weight_gradient",
    "(Tensor dout, Tensor x, Tensor weight, Tensor counts, str backend) -> Tensor",
    BACKENDS,
    _fake_weight_gradient,
)
register_gradient("grouped_matmul", _gradient, _save)
