"""x @ weight.T + bias, forward and both gradients, by the faster of the libraries that torch already carries.

On CPU torch computes fp32 products with MKL, which does not use AVX-512 on AMD processors: there oneDNN, in the
same torch, is 2.2 times as fast in the same precision (Zen 4). On AMD processors with AVX2 alone MKL is the faster
by 10 to 23 % (Zen 3, bench/linear.py), on Intel processors it is at least as fast.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.calls import called_under_autograd, has_listener
from pypar.ops.register import register, register_gradient

# oneDNN adds up to 1024 terms, and more, in one chain, whose error grows with its length: at 1024 terms it is 2.5
# times MKL's and twice OpenBLAS's, which add 128 to 384 before they begin another. A sum is cut into pieces of at most
# so many terms, which costs one addition for each result and piece, and copies of operands that lie row by row.
_MAX_TERMS = 512
_MIN_FEATURES = 16


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
    name = _choose(x, weight.shape[1], weight.shape[0], backend)
    is_heard = not torch.compiler.is_compiling() and has_listener()
    if name != "torch" or (is_heard and bias is not None):  # torch may add it after the product
        return _forward(x, weight, bias, name)
    compute = functools.partial(torch.nn.functional.linear, x, weight, bias)
    return called_under_autograd("linear", compute) if is_heard else compute()


def linear_forward(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """x @ weight.T: x [..., K], weight [O, K] -> [..., O]. For layers that write their own backward."""
    _check_matrix("x", x, weight, 1)
    name = _choose(x, weight.shape[1], weight.shape[0], backend)
    return torch.nn.functional.linear(x, weight) if name == "torch" else _forward(x, weight, None, name)


def linear_input_gradient(dout: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """dout @ weight: dout [..., O], weight [O, K] -> dx [..., K]."""
    _check_matrix("dout", dout, weight, 0)
    name = _choose(dout, weight.shape[1], weight.shape[0], backend)
    return torch.matmul(dout, weight) if name == "torch" else _input_gradient(dout, weight, name)


def linear_weight_gradient(dout: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """dout.T @ x, summed over all leading dimensions: dout [..., O], x [..., K] -> dweight [O, K]."""
    if dout.shape[:-1] != x.shape[:-1] or dout.dtype != x.dtype:
        raise ValueError(
            f"dout {tuple(dout.shape)} {dout.dtype} and x {tuple(x.shape)} {x.dtype} must have the same dtype and the "
            "same dimensions but the last; pass the x of the forward pass"
        )
    name = _choose(dout, x.shape[-1], dout.shape[-1], backend)
    return _torch_weight_gradient(dout, x) if name == "torch" else _weight_gradient(dout, x, name)


@dataclass(frozen=True)
class Processor:
    """What the choice of a library depends on: a vendor such as "AuthenticAMD" ("unknown" where Linux does not say)."""

    vendor: str
    has_avx512: bool


def processor() -> Processor:
    """This machine's, as /proc/cpuinfo describes its first processor."""
    facts = {}
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if not line.strip():  # the end of the first processor
                    break
                name, _, value = line.partition(":")
                facts[name.strip()] = value.strip()
    except OSError:
        pass
    return Processor(facts.get("vendor_id", "unknown"), "avx512f" in facts.get("flags", "").split())


def library_choice(processor: Processor) -> tuple[str, str]:
    """(backend that fp32 on CPU takes first, why)."""
    missing = _onednn_missing()
    if missing is not None:
        return "torch", missing
    own = "MKL" if torch.backends.mkl.is_available() else "its own library, for want of MKL,"
    if processor.vendor == "AuthenticAMD" and processor.has_avx512:
        return (
            "onednn",
            f"torch takes {own} for fp32, and oneDNN was the faster on AMD processors with AVX-512",
        )
    with_or_without = "with" if processor.has_avx512 else "without"
    return (
        "torch",
        f"torch takes {own} for fp32, and oneDNN was seen to be faster on AMD processors with AVX-512 only "
        f"(vendor {processor.vendor}, {with_or_without} AVX-512)",
    )


@dataclass(frozen=True)
class LinearBackend(Backend):
    """A backend whose backward comes in two parts, since layers need one without the other."""

    input_gradient: Callable
    weight_gradient: Callable


def backends_for(processor: Processor) -> tuple[LinearBackend, ...]:
    """The backends, fastest first, for a processor."""
    return (_ONEDNN, _TORCH) if library_choice(processor)[0] == "onednn" else (_TORCH, _ONEDNN)


def _check_matrix(name: str, x: Tensor, weight: Tensor, dim: int) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[dim] or x.dtype != weight.dtype:
        raise ValueError(
            f"{name} {tuple(x.shape)} {x.dtype} must have weight {tuple(weight.shape)} {weight.dtype}'s size in dim "
            f"{dim} as its last dimension, and its dtype; transpose or convert one of them"
        )


def _choose(x: Tensor, in_features: int, out_features: int, backend: str | None) -> str:
    args = {"x": x, "in_features": in_features, "out_features": out_features}
    return choose("linear", BACKENDS, args, backend).name


def _torch_weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    return dout.reshape(-1, dout.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b.T [K, O] + bias."""
    pieces = -(-a.shape[1] // _MAX_TERMS)
    if pieces == 1:
        return _onednn_chain(a, b, bias)
    parts = zip(a.tensor_split(pieces, 1), b.tensor_split(pieces, 1), strict=True)
    out = _onednn_chain(*next(parts), bias)
    for part in parts:
        out += _onednn_chain(*part)
    return out


def _onednn_chain(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")


def _dense(a: Tensor) -> Tensor:
    """oneDNN reads a matrix or its transpose as they are; other strides take it a hundred times as long."""
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


def _onednn_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _unflatten(_onednn_product(x.reshape(-1, x.shape[-1]), weight, bias), x.shape[:-1])


def _onednn_input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
    return _unflatten(_onednn_product(dout.reshape(-1, dout.shape[-1]), weight.t()), dout.shape[:-1])


def _onednn_weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    dout, x = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    return _onednn_product(dout.t(), x.t())


def _unflatten(result: Tensor, leading: torch.Size) -> Tensor:
    """[rows, features] as [*leading, features]: to autograd a tensor of its own, not a view, as torch's results are."""
    return torch.ops.aten._unsafe_view(result, (*leading, result.shape[-1]))


def _onednn_missing() -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"oneDNN's fp32 product was only measured on x86-64, and this is {platform.machine()}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN"
    return None


def _onednn_unsupported(x: Tensor, in_features: int, out_features: int) -> str | None:
    if _ONEDNN_MISSING is not None:
        return _ONEDNN_MISSING
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, and oneDNN computes on CPU"
    if x.dtype != torch.float32:
        return f"x is {x.dtype}; only float32 gains, torch's own choice is as good for other dtypes"
    if forward_ad._current_level >= 0:
        return "torch's own product has a derivative in forward mode (torch.func.jvp), and this one has none"
    if not x.numel() or min(in_features, out_features) < _MIN_FEATURES:
        return f"there is nothing to gain below {_MIN_FEATURES} features, nor for an empty x"
    return None


def _backward_of(input_gradient: Callable, weight_gradient: Callable) -> Callable:
    def backward(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return input_gradient(dout, weight), weight_gradient(dout, x)

    return backward


_ONEDNN_MISSING = _onednn_missing()
_ONEDNN = LinearBackend(
    "onednn",
    _onednn_forward,
    _backward_of(_onednn_input_gradient, _onednn_weight_gradient),
    _onednn_unsupported,
    _onednn_input_gradient,
    _onednn_weight_gradient,
)
_TORCH = LinearBackend(
    "torch",
    torch.nn.functional.linear,
    _backward_of(torch.matmul, _torch_weight_gradient),
    never_refuses,
    torch.matmul,
    _torch_weight_gradient,
)
BACKENDS = backends_for(processor())


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
