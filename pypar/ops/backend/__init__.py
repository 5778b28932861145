"""How an operator finds the code that runs it.

An operator has an ordered tuple of backends, fastest first, the plain PyTorch reference last. Who decides:
the caller's `backend=`, then the environment variable PYPAR_BACKEND (for the operators that have such a
backend), then the first backend that does not refuse. Nothing falls back in silence: a named backend that
refuses is an error with its reason, and the reference on a GPU tensor warns.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "PYPAR_BACKEND"


def never_refuses(*_: object, **__: object) -> None:
    """`unsupported` of a backend that runs everything, as the reference does."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    forward and backward take what the operator's file says they take. `unsupported(**args)` looks at metadata
    only (shape, dtype, device, strides, options) and returns None when the backend can run them, else the
    reason as a phrase that completes "refuses: ...", for example "float64 is not one of float32, bfloat16,
    float16".
    """

    name: str
    forward: Callable
    backward: Callable | None
    unsupported: Callable[..., str | None]


class RefusalError(ValueError):
    """A backend that was asked for by name cannot run this. `reason` is what its `unsupported` said."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def choose(
    op: str, backends: tuple[Backend, ...], args: Mapping[str, object], requested: str | None
) -> Backend:
    """The backend that runs `op` on `args`.

    Raises ValueError when the requested backend does not exist or refuses, and when every backend refuses.
    """
    named = requested or os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        backend = _by_name(op, backends, named, from_environment=not requested)
        if backend is not None:
            reason = backend.unsupported(**args)
            if reason is not None:
                source = "backend=" if requested else ENVIRONMENT_VARIABLE + "="
                raise RefusalError(
                    f"{op}: the backend named by {source}{named!r} refuses: {reason}; "
                    f"name another of {_names(backends)}, or none to let pypar choose",
                    reason,
                )
            return backend
    for backend in backends:
        if backend.unsupported(**args) is None:
            if backend.name == "reference" and not torch.compiler.is_compiling():
                _warn_if_on_gpu(op, backends, args)
            return backend
    reasons = "; ".join(f"{b.name}: {b.unsupported(**args)}" for b in backends)
    raise ValueError(f"{op}: every backend refuses: {reasons}")


def op_modules() -> list[ModuleType]:
    """Every module of pypar.ops that defines BACKENDS, by name. A new operator is found by being there."""
    package = importlib.import_module("pypar.ops")
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]
    return [module for module in modules if hasattr(module, "BACKENDS")]


def unknown_name(what: str, name: object, known: Iterable[str], prefix: str = "") -> str:
    """A sentence that says that `name` is not known, what is, and which one was probably meant."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{prefix}unknown {what} {name!r}, known are {', '.join(known)}{hint}"


def _by_name(op: str, backends: tuple[Backend, ...], name: str, from_environment: bool) -> Backend | None:
    for backend in backends:
        if backend.name == name:
            return backend
    if not from_environment:
        raise ValueError(unknown_name("backend", name, [b.name for b in backends], f"{op}: "))
    # The variable speaks to all operators: another one may have the backend that this one lacks.
    if not torch.compiler.is_compiling() and name not in _all_backend_names():
        raise ValueError(unknown_name("backend", name, _all_backend_names(), f"{ENVIRONMENT_VARIABLE}: "))
    return None


def _names(backends: tuple[Backend, ...]) -> str:
    return ", ".join(repr(b.name) for b in backends)


@functools.cache
def _all_backend_names() -> tuple[str, ...]:
    return tuple(sorted({backend.name for module in op_modules() for backend in module.BACKENDS}))


def _warn_if_on_gpu(op: str, backends: tuple[Backend, ...], args: Mapping[str, object]) -> None:
    tensor = _first_tensor(tuple(args.values()))
    if tensor is not None and tensor.device.type not in ("cpu", "meta"):
        reasons = "; ".join(f"{b.name}: {b.unsupported(**args)}" for b in backends if b.name != "reference")
        _warn_once(op, tensor.device.type, reasons or "it has no other backend yet")


def _first_tensor(value: object) -> torch.Tensor | None:
    """The first tensor among an operator's arguments, which may be lists, and records of them."""
    if isinstance(value, torch.Tensor):
        return value
    if dataclasses.is_dataclass(value):
        value = tuple(vars(value).values())
    if isinstance(value, (tuple, list)):
        return next((found for each in value if (found := _first_tensor(each)) is not None), None)
    return None


@functools.cache
def _warn_once(op: str, device_type: str, reasons: str) -> None:
    warnings.warn(
        f"pypar.{op} runs its plain PyTorch reference on {device_type}, which is slow ({reasons}); "
        f'backend="reference" says so on purpose and silences this',
        stacklevel=5,
    )
