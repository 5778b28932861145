"""Calls a store before and after each block of a model's forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from pypar.blocks import Block, blocks_of
from pypar.data_parallel.store import Store


def around_blocks(model: nn.Module, store: Store) -> None:
    """Let the model call the store's `enter` and `leave` for each of its blocks, where the store acts on them.

    A forward enters a block before the first of its modules and leaves it after the last one. A backward enters a block
    when a gradient of its outputs is there, and leaves it when it comes to another block, or ends. A forward that fails
    leaves the block it was in. Nothing is added to a model whose store does not act on blocks. ValueError for a model
    that does not say its blocks.
    """
    if store.acts_on_blocks:
        _Watch(store).watch(model)


class _Watch:
    """The hooks of one model, and the block whose backward runs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.in_forward: Block | None = None
        self.in_backward: Block | None = None
        self.backward = -1  # torch's number of the backward that runs: one that failed is not gone on with

    def watch(self, model: nn.Module) -> None:
        for block in blocks_of(model):
            modules = [model.get_submodule(name) for name in block.modules if _is_here(model, name)]
            if modules:
                modules[0].register_forward_pre_hook(lambda *_, block=block: self._enter(block))
                modules[-1].register_forward_hook(lambda *given, block=block: self._leave(block, given[-1]))
        model.register_forward_hook(lambda *_: self._end_forward(), always_call=True)

    def _enter(self, block: Block) -> None:
        self.in_forward = block
        self.store.enter(block)

    def _end_forward(self) -> None:
        """A block that is still entered is one that raised."""
        if self.in_forward is not None:
            self.store.leave(self.in_forward)
            self.in_forward = None

    def _leave(self, block: Block, output: Any) -> None:
        self._end_forward()
        made = [x for x in _tensors(output) if x.requires_grad]
        if made and torch.is_grad_enabled():
            torch.autograd.graph.register_multi_grad_hook(
                made, lambda _: self._enter_backward(block), mode="any"
            )

    def _enter_backward(self, block: Block) -> None:
        if self.in_backward is not None:
            self.store.leave(self.in_backward)
        if self.backward != torch._C._current_graph_task_id():
            self.backward = torch._C._current_graph_task_id()
            Variable._execution_engine.queue_callback(self._end_backward)
        self.in_backward = block
        self.store.enter(block)

    def _end_backward(self) -> None:
        if self.in_backward is not None:
            self.store.leave(self.in_backward)
        self.in_backward = None


def _is_here(model: nn.Module, name: str) -> bool:
    """Whether a module is in this stage of a model."""
    found: Any = model
    for part in name.split("."):
        found = found._modules.get(part) if isinstance(found, nn.Module) else None
    return found is not None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (tuple, list)) else []
