"""Making an operator known to PyTorch: schema, implementation, fake (shapes for torch.compile) and gradient.

The schema of `rms_norm`, for example, is the two functions pypar::rms_norm_forward and
pypar::rms_norm_backward, whose last argument names the backend that was chosen; backward runs the backend
that forward ran.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext

from pypar.ops.backend import Backend
from pypar.ops.register.derivative import Derivative, Derivatives, autograd_kernel, one_by_one
from pypar.ops.uncompiled import uncompiled

Function = TypeVar("Function", bound=Callable[..., Any])

_library = torch.library.Library("pypar", "FRAGMENT")
_derivatives: Derivatives = {}


def register(
    op: str, direction: str, signature: str, backends: tuple[Backend, ...], fake: Callable
) -> Callable:
    """Define pypar::<op>_<direction> with `signature`, a schema such as "(Tensor x, str backend) -> Tensor".

    Its last argument is `str backend`; the others are those of the backends' function for that direction.
    `fake` takes the same arguments and returns empty tensors of the right shape.
    """
    implementations = {backend.name: getattr(backend, direction) for backend in backends}

    def run(*args):
        return implementations[args[-1]](*args[:-1])

    return define(f"{op}_{direction}", signature, run, fake)


def define(name: str, signature: str, run: Callable, fake: Callable) -> Callable:
    """Define pypar::<name> with `signature`; `run` and `fake` take its arguments.

    Without a call of `register_gradient` it refuses to be differentiated: autograd would go on with zeros.
    """
    _library.define(name + signature)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pypar::{name}", fake, lib=_library)
    op = getattr(torch.ops.pypar, name).default
    _library.impl(name, autograd_kernel(op, _derivatives), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"pypar::{name}", one_by_one(op), lib=_library)
    return op


def register_gradient(op: str, gradient: Callable, save: Callable, direction: str = "forward") -> None:
    """Give pypar::<op>_<direction> its derivative: save(ctx, inputs, output), gradient(ctx, *douts)."""
    _derivatives[f"{op}_{direction}"] = Derivative(gradient, save)


def overridable(function: Function) -> Function:
    """Lets a torch.overrides.TorchFunctionMode, or a class of tensors, take the function's place as it may torch's.

    Its first arguments are tensors.
    """

    handle = uncompiled("what stands in for it may be anything")(handle_torch_function)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        operands = arguments[:3] or tuple(options.values())
        # torch.compile takes has_torch_function to be False under a mode.
        if has_torch_function(operands) or (torch.compiler.is_dynamo_compiling() and _in_a_mode()):
            return handle(call, operands, *arguments, **options)
        return function(*arguments, **options)

    return call  # type: ignore[return-value]


def _in_a_mode() -> bool:
    """Whether a TorchFunctionMode is on, other than torch.device's, which has nothing to replace here."""
    modes = _get_current_function_mode_stack() if torch._C._is_torch_function_mode_enabled() else []
    return any(not isinstance(mode, DeviceContext) for mode in modes)
