"""Optimizer states of tensors that are cut: what a state_dict shows of them, from which any layout is loaded.

torch.optim gives its states no hook by parameter, but calls every optimizer's step through global ones. At an
optimizer's first step the states of its cut parameters are made ready and its state_dict is told to show
what `Sharded.for_state_dict` gives.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pypar.sharded.tensor import Sharded


def watch_optimizers() -> None:
    """From now on look at every optimizer before its steps; once in a process."""
    register_optimizer_step_pre_hook(_Watch())


class _Watch:
    """The hook before every step of every optimizer."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._known:
            return
        if any(isinstance(p, Sharded) for group in optimizer.param_groups for p in group["params"]):
            self._known.add(optimizer)
            optimizer.register_load_state_dict_post_hook(take_states)
            optimizer.register_state_dict_post_hook(_show_dtensors)
            take_states(optimizer)


def take_states(optimizer: torch.optim.Optimizer) -> None:
    """States that were loaded, whole or as DTensors, become cut as their parameters are."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Sharded):
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and not isinstance(value, Sharded)
                    and value.shape == parameter.shape
                ):
                    state[name] = parameter.part_of(value)


def _show_dtensors(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    states = {
        key: {
            name: value.for_state_dict() if isinstance(value, Sharded) else value
            for name, value in state.items()
        }
        if isinstance(state, dict)
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}
