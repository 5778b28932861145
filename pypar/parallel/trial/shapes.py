"""A trial of a cut model's shapes: forwards without data and without communication, before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pypar.axis import Axis
from pypar.parallel.regions import head_counts, is_cut_inside, listed
from pypar.parallel.roles import ROLES
from pypar.parallel.trial.unchanged import unchanged

if TYPE_CHECKING:
    from pypar.parallel.rules import Reading


def check_shapes(model: nn.Module, reading: Reading, axis: Axis, call: Callable[[nn.Module], Any]) -> None:
    """ValueError, with the module's name, where the model does not run with this rank's part of the weights.

    Column-parallel and row-parallel layers need no communication for the shapes to be right; the others take and
    give what is whole, so that they keep their whole weights here. Nothing is said of a model that does not run
    without data even when it is whole (its shapes depend on values).
    """
    parts = {}
    for match in reading.matches:
        if is_cut_inside(match):
            dim = ROLES[match.role].cut_dim or 0
            for parameter in match.parameters():
                shape = list(parameter.shape)
                if dim < len(shape):  # a row-parallel layer's bias is whole
                    shape[dim] //= axis.size
                parts[id(parameter)] = shape
    if _failure(model, call, {}) is not None:
        return
    counts = {
        id(r.module): {n: c // axis.size for n, c in head_counts(r.module).items()} for r in reading.regions
    }
    error = _failure(model, call, parts, counts)
    if error is not None:
        where = innermost(model, error)
        raise ValueError(
            f"this {type(model).__name__}, cut over {axis.name}, does not run: in {where} {first_line(error)}; "
            f"it needs all its heads or features in one place. {remedy(reading, where)}"
        ) from error


def remedy(reading: Reading, where: str) -> str:
    """What the caller can do about a module that cannot be cut by its plan."""
    around = [r.name for r in reading.regions if where == r.name or where.startswith(f"{r.name}.")]
    block = listed([max(around, key=len)]) if around else ""
    if not block:
        return "Give a plan that leaves more of it whole"
    if reading.is_given:
        return f'Leave it whole: put "{block}.*": "whole" in front of the plan'
    return f'Leave it whole: plan={{"{block}.*": "whole", **pypar.parallel.plan_of(model)}}'


def _failure(
    model: nn.Module,
    call: Callable[[nn.Module], Any],
    parts: Mapping[int, list[int]],
    counts: Mapping[int, Mapping[str, int]] | None = None,
) -> Exception | None:
    """What a forward of the model raises, with parameters of the shapes ``parts`` and attributes ``counts``."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        if id(x) not in fakes:
            whole = mode.from_tensor(x)
            with mode:
                fakes[id(x)] = (
                    nn.Parameter(x.new_empty(parts[id(x)]), x.requires_grad) if id(x) in parts else whole
                )
        return fakes[id(x)]

    with unchanged(model), torch.no_grad():
        for module in model.modules():
            held: Any
            for held in (module._parameters, module._buffers):
                held.update({name: fake(x) for name, x in held.items() if x is not None})
            for name, count in (counts or {}).get(id(module), {}).items():
                setattr(module, name, count)
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints what it also raises
        was_disabled, logger.disabled = logger.disabled, True
        try:
            with mode:
                call(model)
        except Exception as error:
            return error
        finally:
            logger.disabled = was_disabled
    return None


def innermost(model: nn.Module, error: Exception) -> str:
    """The name of the innermost module whose code raised the error."""
    names = {id(module): name for name, module in model.named_modules()}
    found, traceback = "", error.__traceback__
    while traceback is not None:
        found = names.get(id(traceback.tb_frame.f_locals.get("self")), found)
        traceback = traceback.tb_next
    return found or "the model"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
