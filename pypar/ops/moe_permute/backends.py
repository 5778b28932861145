"""moe_permute and moe_combine by the native kernels, by Triton and by the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.moe_permute import definition
from pypar.ops.moe_permute.definition import Order, check_places, out_of_range
from pypar.ops.rows import as_rows, native_refusal

_BLOCK = 4096  # choices that one thread sorts at a time


@dataclass(frozen=True)
class PermuteBackend(Backend):
    """A backend of moe_permute, whose forward and backward move rows, with the sort and moe_combine."""

    order: Callable
    combine_forward: Callable
    combine_backward: Callable


def _native_order(experts: Tensor, num_experts: int) -> Order:
    experts = experts.contiguous()
    choices = experts.numel()
    counts, sources = torch.empty(num_experts, dtype=torch.int64), torch.empty(choices, dtype=torch.int64)
    places = torch.empty_like(experts)
    blocks = -(-choices // _BLOCK)
    starts = torch.empty(blocks, num_experts + 1, dtype=torch.int64)
    wrong = native.run(
        native.module().moe_permute_order,
        experts, counts, places, sources, starts, torch.empty(blocks, dtype=torch.int64),
        choices, num_experts, _BLOCK, native.num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise out_of_range(int(experts.flatten()[wrong]), num_experts)
    return counts, places, sources


def _native_forward(x: Tensor, places: Tensor) -> Tensor:
    return _native_scatter(x, places, None, None)[0]


def _native_backward(drows: Tensor, places: Tensor) -> Tensor:
    return _native_gather(drows, places, None)


def _native_combine_forward(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    check_places(places, len(rows))
    return _native_gather(rows, places, weights)


def _native_combine_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _native_scatter(dout, places, weights, rows)


def _native_scatter(
    x: Tensor, places: Tensor, weights: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(each token times its weights at its rows, its products with `rows` [T, k] or [0])."""
    x, places, weights = as_rows(x), places.contiguous(), _in_fp32(weights)
    rows = None if rows is None else as_rows(rows)
    (T, k), D = places.shape, x.shape[1]
    out = torch.empty(T * k, D, dtype=x.dtype)
    products = torch.empty((0,) if rows is None else (T, k))
    native.run(
        native.module().moe_permute_scatter,
        x, places, _or_null(weights), _or_null(rows), out, 0 if rows is None else products,
        T, D, k, x.stride(0), 0 if rows is None else rows.stride(0), native.dtype_code(x), native.num_threads(),
    )  # fmt: skip
    return out, products


def _native_gather(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    rows, places = as_rows(rows), places.contiguous()
    T, k = places.shape
    out = torch.empty(T, rows.shape[1], dtype=rows.dtype)
    native.run(
        native.module().moe_permute_gather,
        rows, places, _or_null(_in_fp32(weights)), out,
        T, rows.shape[1], k, rows.stride(0), native.dtype_code(rows), native.num_threads(),
    )  # fmt: skip
    return out


def _in_fp32(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.float().contiguous()


def _or_null(x: Tensor | None) -> Tensor | int:
    """What native.run makes an address of."""
    return 0 if x is None else x


def _triton_order(experts: Tensor, num_experts: int) -> Order:
    from pypar.kernels import moe_permute

    return moe_permute.order(experts.contiguous(), num_experts)


def _triton_forward(x: Tensor, places: Tensor) -> Tensor:
    from pypar.kernels import moe_permute

    return moe_permute.scatter(as_rows(x), places.contiguous(), None, None)[0]


def _triton_backward(drows: Tensor, places: Tensor) -> Tensor:
    return _triton_combine_forward(drows, places, None)


def _triton_combine_forward(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    from pypar.kernels import moe_permute

    return moe_permute.gather(as_rows(rows), places.contiguous(), _in_fp32(weights))


def _triton_combine_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    from pypar.kernels import moe_permute

    rows = None if rows is None else as_rows(rows)
    return moe_permute.scatter(as_rows(dout), places.contiguous(), _in_fp32(weights), rows)


def _native_unsupported(x: Tensor, *others: Tensor | None, **named: Tensor | None) -> str | None:
    return native_refusal(x, *(y for y in (*others, *named.values()) if y is not None))


def _triton_unsupported(x: Tensor, *others: Tensor | None, **named: Tensor | None) -> str | None:
    return triton_refusal(x, *others, *named.values())


BACKENDS = (
    PermuteBackend(
        "native",
        _native_forward,
        _native_backward,
        _native_unsupported,
        _native_order,
        _native_combine_forward,
        _native_combine_backward,
    ),
    PermuteBackend(
        "triton",
        _triton_forward,
        _triton_backward,
        _triton_unsupported,
        _triton_order,
        _triton_combine_forward,
        _triton_combine_backward,
    ),
    PermuteBackend(
        "reference",
        definition.reference_forward,
        definition.reference_backward,
        never_refuses,
        definition.reference_order,
        definition.reference_combine_forward,
        definition.reference_combine_backward,
    ),
)
