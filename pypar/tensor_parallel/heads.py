"""Parameters of a module of the user's with a value or a row for each head, such as attention sinks."""

from __future__ import annotations

from typing import Any

from torch import nn

from pypar.comm import split_to
from pypar.mesh import Axis


def give_heads(module: nn.Module, name: str, axis: Axis) -> None:
    """Let the module's forward see this rank's rows of a parameter, which itself stays whole, as does its gradient.

    It is as small as the number of heads, and whatever reads parameters (checkpoints, norms, optimizers) finds it
    like any other that is not cut.
    """
    module.register_forward_pre_hook(_Show(name, axis), prepend=True)
    module.register_forward_hook(_Hide(name), always_call=True)


class _Show:
    def __init__(self, name: str, axis: Axis) -> None:
        self.name, self.axis = name, axis

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        # An entry of the instance is found before nn.Module looks among parameters.
        vars(module)[self.name] = split_to(module._parameters[self.name], self.axis, 0)  # type: ignore[arg-type]


class _Hide:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        vars(module).pop(self.name, None)
