"""What one stage does for one microbatch: forward, and its backward whole or in two parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pypar.pipeline_parallel.messages.header import Header, Value
from pypar.pipeline_parallel.split_backward import SplitBackward

# What a stage is called with: (received, microbatch).
Stage = Callable[[Any, Any], Any]


@dataclass
class _Arrived:
    """The gradients of a stage's differentiable outputs, which lie here from their arrival to the backward."""

    gradients: list[Tensor | None] = field(default_factory=list)
    is_kept: bool = False  # a backward in two parts may ask twice; a whole one frees them while it goes on

    def take(self) -> tuple[Tensor | None, ...]:
        gradients = tuple(self.gradients)
        if not self.is_kept:
            self.gradients.clear()
        return gradients


class _OutputAnchor(torch.autograd.Function):
    """A scalar that stands for a stage's outputs in the graph, so that they are free once sent.

    backward hands on the gradients that have arrived by then, one an output.
    """

    @staticmethod
    def forward(ctx: Any, arrived: _Arrived, *outputs: Tensor) -> Tensor:
        ctx.arrived = arrived
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.arrived.take()


@dataclass
class InFlight:
    """One microbatch of one stage between its forward and the end of its backward."""

    inputs: Value  # leaves; those that require a gradient get one that is sent back
    root: Tensor | None = None  # scalar whose backward is the stage's: the loss, or an `_OutputAnchor`
    has_gradient: tuple[bool, ...] = ()  # of each output that was sent
    arrived: _Arrived = field(default_factory=_Arrived)
    split: SplitBackward | None = None

    def hold(self, outputs: Value) -> None:
        """Keeps the graph of outputs that are sent on, and not the outputs."""
        self.has_gradient = tuple(x is not None and x.requires_grad for x in outputs)
        differentiable = [x for x in outputs if x is not None and x.requires_grad]
        if differentiable:
            self.root = _OutputAnchor.apply(self.arrived, *differentiable)  # type: ignore[no-untyped-call]

    def give(self, gradients: Value) -> None:
        """Takes in the gradients of the outputs that came back, one an output."""
        self.arrived.gradients += [x for x, has in zip(gradients, self.has_gradient, strict=True) if has]

    def backward(self, send: Callable[[Value], None]) -> None:
        """The whole backward; the inputs' gradients are sent as soon as they are complete, before parameters that
        come later.
        """
        waiting = {index for index, x in enumerate(self.inputs) if x is not None and x.requires_grad}
        is_sent = False

        def complete(index: int, _: Tensor) -> None:
            nonlocal is_sent
            waiting.discard(index)
            if not waiting and not is_sent:
                is_sent = True
                send(self._collected())

        hooks = [
            x.register_post_accumulate_grad_hook(partial(complete, index))
            for index, x in enumerate(self.inputs)
            if x is not None and index in waiting
        ]
        try:
            # Not so for a first stage whose parameters are all frozen.
            if self.root is not None and self.root.requires_grad:
                self.root.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:  # they hold this object, which holds the inputs that hold them
                hook.remove()
        if not is_sent:
            send(self._collected())

    def backward_input(self, send: Callable[[Value], None]) -> None:
        """The first part of a split backward."""
        leaves = [x for x in self.inputs if x is not None and x.requires_grad]
        self.arrived.is_kept = True
        if self.root is not None and self.root.requires_grad:
            self.split = SplitBackward(self.root, leaves)
            for x, gradient in zip(leaves, self.split.input_gradients(), strict=True):
                x.grad = gradient
        send(self._collected())

    def backward_weight(self) -> None:
        """The second part of a split backward."""
        if self.split is not None:
            self.split.weight_gradients()

    def _collected(self) -> Value:
        return tuple(None if x is None else x.grad for x in self.inputs)


def received_by(header: Header, value: Value, *, trains: bool) -> Any:
    """What a stage is called with, in the form that the stage before it returned."""
    for x, spec in zip(value, header.specs, strict=True):
        if x is not None and spec is not None and spec.requires_grad and trains:
            x.requires_grad_(True)
    return value if header.is_tuple else value[0]
