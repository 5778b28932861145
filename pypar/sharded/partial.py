"""Gradients of which each rank has a part although it has the whole parameter: norms under sequence parallelism.

They are summed over the axis in backward, so that any loop around a model is right. What sums gradients anyway, by the
parameters' layouts, takes that over (`leave_to_layout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pypar.comm import all_reduce_start
from pypar.layout import layout_of, set_layout
from pypar.mesh import Axis

_SUMMED = "_pypar_summed_in_backward"


def sum_in_backward(parameter: nn.Parameter, axis: Axis) -> None:
    """Let backward give the parameter the sum of its gradients over the axis; its layout says that it is to be.

    A parameter that is frozen gets it too, for when it is trained later.
    """
    layout = layout_of(parameter)
    if not set(axis.names) <= set(layout.sum_over):
        set_layout(parameter, replace(layout, sum_over=(*layout.sum_over, *axis.names)))
    setattr(parameter, _SUMMED, (axis, _hook(parameter, lambda gradient: _sum(gradient, axis))))


def refuse_in_backward(parameter: nn.Parameter, sentence: str) -> None:
    """Let backward raise ValueError with this sentence where the parameter, which is frozen, gets a gradient."""

    def refuse(gradient: Tensor) -> None:
        raise ValueError(sentence)

    _hook(parameter, refuse)


def _hook(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """The handle of a hook on the gradient, which stays while the parameter is frozen; None of whole numbers."""
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return None
    is_trained = parameter.requires_grad
    handle = parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(is_trained)
    return handle


def summed_in_backward(parameter: nn.Parameter) -> Axis | None:
    """The axis over which backward sums the parameter's gradient, if any."""
    summed: Any = getattr(parameter, _SUMMED, None)
    return None if summed is None else summed[0]


def leave_to_layout(parameter: nn.Parameter) -> None:
    """End `sum_in_backward`: the caller sums the gradient over all axes of the layout's `sum_over`."""
    summed: Any = getattr(parameter, _SUMMED, None)
    if summed is not None:
        if summed[1] is not None:
            summed[1].remove()
        delattr(parameter, _SUMMED)


def _sum(gradient: Tensor, axis: Axis) -> Tensor:
    return all_reduce_start(gradient.clone(), axis).wait()
