"""What a module of transformers is: decided by the code that it runs, and by the numbers that it gives.

A class is known if the function in question is, instruction by instruction, that of a class that pypar knows, and the
functions that it calls are too. transformers repeats such code in the file of each model, so that one known class
stands for many. Before a module's class is changed, the old and the new function run on a few random numbers.
"""

from __future__ import annotations

import dis
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pypar.ops.substitute import substitute

_LOCALS = ("LOAD_FAST", "STORE_FAST", "DELETE_FAST")
_TOLERANCE = 1e-5  # of fp32 results of some ten operations, and far below what another formula gives


@dataclass(frozen=True)
class Swap:
    """One way to put an operator into a class of modules.

    part: what the modules are, such as "norm"; operator: pypar's, which runs in them; make: gives the members of the
    new class for the one that it replaces.
    """

    part: str
    operator: str
    make: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """The swap that fits a module, and, if it is left all the same, why: the end of a sentence about it."""

    swap: Swap
    reason: str = ""


@functools.cache
def known(path: str) -> Any:
    """ "llama.LlamaMLP.forward" -> that function of transformers' file of the model; None in a version without it."""
    model, *names = path.split(".")
    try:
        value: Any = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        return None
    for name in names:
        value = getattr(value, name, None)
    return value


def is_same(function: Any, other: Any) -> bool:
    """Whether two functions have the same instructions, whatever their local variables are called, and find the same
    under the global names in them: one object, or functions that are the same again."""
    if function is other:
        return True
    if not isinstance(function, FunctionType) or not isinstance(other, FunctionType):
        return False
    if function.__closure__ or other.__closure__:
        return False
    return _instructions(function.__code__) == _instructions(other.__code__) and all(
        is_same(function.__globals__.get(name), other.__globals__.get(name))
        for name in global_names(function.__code__)
    )


@functools.cache
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a function's code looks up among the globals of its module."""
    found = (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    return tuple(dict.fromkeys(found))


@functools.cache
def _instructions(code: CodeType) -> list[tuple[str, Any]]:
    places = {name: place for place, name in enumerate(code.co_varnames)}
    found: list[tuple[str, Any]] = [("arguments", (code.co_argcount, code.co_kwonlyargcount, code.co_flags))]
    for each in dis.get_instructions(code):
        if each.opname in ("RESUME", "EXTENDED_ARG"):
            continue
        is_local = each.opname.startswith(_LOCALS)
        names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        found.append((each.opname, tuple(places[name] for name in names) if is_local else each.argval))
    return found


def fused_class(original: Any, swap: Swap) -> Any:
    """A subclass of `original`, with its name, that has the members which the swap makes; the same for every call."""
    return substitute(original, _members, swap)


def _members(original: type, swap: Swap) -> dict[str, Any]:
    return {**swap.make(original), "pypar_swap": swap}


def swap_of(module: nn.Module) -> Swap | None:
    """What has been put into a module's class, None where nothing has."""
    return vars(type(module)).get("pypar_swap")


def covered(module: nn.Module) -> str:
    """A reason where somebody has put another forward over the one of the module's class, as hooks of some do."""
    return "another forward has been put over that of its class" if "forward" in vars(module) else ""


def stand_in(module: nn.Module, parameters: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> Any:
    """An instance of the module's class with its attributes, but with small parameters and children."""
    small = object.__new__(type(module))
    small.__dict__.update(vars(module))
    small.__dict__.update(
        _parameters=dict(parameters),
        _modules=dict(children),
        _buffers={},
        _forward_hooks={},
        _forward_pre_hooks={},
    )
    return small


def difference(original: Callable[..., Any], fused: Callable[..., Any], *inputs: Tensor) -> str:
    """How the results and gradients of two functions of tensors [...] differ, as a reason; "" where they agree."""
    try:
        expected, actual = (_results(function, inputs) for function in (original, fused))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"a trial of it failed ({type(error).__name__}: {error})"
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"it gives {tuple(b.shape)} {b.dtype}, and the operator {tuple(a.shape)} {a.dtype}"
        apart = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        if not apart <= _TOLERANCE:
            return f"it computes something else: a trial differs by {apart:.1e} of the largest value"
    return ""


def _results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All results, and the gradients of the inputs for a gradient that differs from element to element."""
    device = inputs[0].device
    with torch.inference_mode(False), torch.enable_grad(), device:
        inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
        found = function(*inputs)
        outs = [found] if isinstance(found, Tensor) else list(found)
        weighted = [(x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in outs]
        gradients = torch.autograd.grad(torch.stack(weighted).sum(), inputs)
    return [*(x.detach() for x in outs), *gradients]


def device_of(module: nn.Module) -> torch.device:
    """Where a trial for a module runs: where its parameters are, but the CPU for those on meta."""
    return next((x.device for x in module.parameters() if not x.is_meta), torch.device("cpu"))


def numbers(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal, fp32, from a generator of their own."""
    with torch.inference_mode(False):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
