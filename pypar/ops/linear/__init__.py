"""x @ weight.T + bias, forward and both gradients, by the faster of the libraries that torch already carries.

On CPU torch computes fp32 products with MKL, which does not use AVX-512 on AMD processors: there oneDNN, in the
same torch, is 2.2 times as fast in the same precision (Zen 4). On AMD processors with AVX2 alone MKL is the faster
by 10 to 23 % (Zen 3, bench/linear.py), on Intel processors it is at least as fast. Products of bf16 and fp16 are made
in fp32 where the processor has no instructions for them (`pypar.ops.linear.upcast`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pypar.ops.backend import choose
from pypar.ops.calls import called_under_autograd, has_listener
from pypar.ops.linear.choice import backends_for, processor, torch_weight_gradient
from pypar.ops.linear.upcast import HALVES
from pypar.ops.register import register, register_gradient

_PROCESSOR = processor()
_ORDERS = {dtype: backends_for(_PROCESSOR, dtype) for dtype in (torch.float32, *HALVES)}
BACKENDS = _ORDERS[torch.float32]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x @ weight.T + bias.

    x: [..., K]; weight: [O, K]; bias: [O] or None; one dtype, any strides. Returns [..., O] of that dtype.
    ValueError: shapes or dtypes that do not fit, a backend that refuses.
    """
    _check_matrix("x", x, weight, 1)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} must be [O] = {tuple(weight.shape[:1])}, one value a row of weight"
        )
    name = chosen(x, weight.shape[1], weight.shape[0], backend)
    is_heard = not torch.compiler.is_compiling() and has_listener()
    if name != "torch" or (is_heard and bias is not None):  # torch may add it after the product
        return _forward(x, weight, bias, name)
    compute = functools.partial(torch.nn.functional.linear, x, weight, bias)
    return called_under_autograd("linear", compute) if is_heard else compute()


def linear_forward(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """x @ weight.T: x [..., K], weight [O, K] -> [..., O]. For layers that write their own backward."""
    _check_matrix("x", x, weight, 1)
    name = chosen(x, weight.shape[1], weight.shape[0], backend)
    return torch.nn.functional.linear(x, weight) if name == "torch" else _forward(x, weight, None, name)


def linear_input_gradient(dout: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """dout @ weight: dout [..., O], weight [O, K] -> dx [..., K]."""
    _check_matrix("dout", dout, weight, 0)
    name = chosen(dout, weight.shape[1], weight.shape[0], backend)
    return torch.matmul(dout, weight) if name == "torch" else _input_gradient(dout, weight, name)


def linear_weight_gradient(dout: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """dout.T @ x, summed over all leading dimensions: dout [..., O], x [..., K] -> dweight [O, K]."""
    if dout.shape[:-1] != x.shape[:-1] or dout.dtype != x.dtype:
        raise ValueError(
            f"dout {tuple(dout.shape)} {dout.dtype} and x {tuple(x.shape)} {x.dtype} must have the same dtype and the "
            "same dimensions but the last; pass the x of the forward pass"
        )
    name = chosen(dout, x.shape[-1], dout.shape[-1], backend)
    return torch_weight_gradient(dout, x) if name == "torch" else _weight_gradient(dout, x, name)


def chosen(x: Tensor, in_features: int, out_features: int, backend: str | None = None) -> str:
    """The name of the backend that multiplies x by a weight of these sizes."""
    args = {"x": x, "in_features": in_features, "out_features": out_features}
    return choose("linear", _ORDERS.get(x.dtype, BACKENDS), args, backend).name


def _check_matrix(name: str, x: Tensor, weight: Tensor, dim: int) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[dim] or x.dtype != weight.dtype:
        raise ValueError(
            f"{name} {tuple(x.shape)} {x.dtype} must have weight {tuple(weight.shape)} {weight.dtype}'s size in dim "
            f"{dim} as its last dimension, and its dtype; transpose or convert one of them"
        )


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_input_gradient(dout: Tensor, weight: Tensor, backend: str) -> Tensor:
    return dout.new_empty(*dout.shape[:-1], weight.shape[1])


def _fake_weight_gradient(dout: Tensor, x: Tensor, backend: str) -> Tensor:
    return dout.new_empty(dout.shape[-1], x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    x_needed, weight_needed, bias_needed, _ = ctx.needs_input_grad
    dx = _input_gradient(dout, weight, ctx.backend) if x_needed else None
    dweight = _weight_gradient(dout, x, ctx.backend) if weight_needed else None
    dbias = dout.reshape(-1, dout.shape[-1]).sum(0) if bias_needed else None
    return dx, dweight, dbias, None


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, ctx.backend = inputs
    ctx.save_for_backward(a, b)


def _gradient_of_input_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dout, weight = ctx.saved_tensors
    return _forward(ddx, weight, None, ctx.backend), _weight_gradient(dout, ddx, ctx.backend), None


def _gradient_of_weight_gradient(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    dout, x = ctx.saved_tensors
    return _forward(x, ddweight, None, ctx.backend), _input_gradient(dout, ddweight, ctx.backend), None


_forward = register(
    "linear",
    "forward",
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    BACKENDS,
    _fake_forward,
)
_input_gradient = register(
    "linear",
    "input_gradient",
    "(Tensor dout, Tensor weight, str backend) -> Tensor",
    BACKENDS,
    _fake_input_gradient,
)
_weight_gradient = register(
    "linear",
    "weight_gradient",
    "(Tensor dout, Tensor x, str backend) -> Tensor",
    BACKENDS,
    _fake_weight_gradient,
)
register_gradient("linear", _gradient, _save)
register_gradient("linear", _gradient_of_input_gradient, _save_product, "input_gradient")
register_gradient("linear", _gradient_of_weight_gradient, _save_product, "weight_gradient")
