"""Calls a store before and after each block of a model's forward and backward."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from pypar.blocks import Block, blocks_of, is_here
from pypar.data_parallel.store import ActsOnBlocks, Store
from pypar.ops.uncompiled import uncompiled

_LEFT = "_pypar_left_by_a_block"  # the tensor's node in the graph when a block returned it
_REASON = "a store brings and takes away parameters around it"


def around_blocks(
    model: nn.Module, store: Store, blocks: Sequence[Block] | None = None, root: str = ""
) -> None:
    """Let the model call the store's `enter` and `leave` around each of its blocks, where the store acts on them.

    A forward enters a block before the first of its modules and leaves it after the last one. A backward enters a block
    when a gradient of its outputs is there, and leaves it when it comes to another block, or ends. What is computed
    again inside a backward enters its block, which stays until its backward is over. The whole forward and the whole
    backward enter and leave the block that is named ``root`` and has no modules. A forward that fails leaves the block
    it was in; after a backward that failed the store is told to `abandon` it before anything else. Nothing is added to
    a model whose store does not act on blocks.

    blocks  by default the model's own; ValueError for a model that does not say its blocks
    """
    if isinstance(store, ActsOnBlocks):
        _Watch(store, Block(root, ())).watch(model, blocks_of(model) if blocks is None else blocks)


class _Watch:
    """The hooks of one model, and the block whose forward or backward runs."""

    def __init__(self, store: ActsOnBlocks, root: Block) -> None:
        self.store, self.root = store, root
        self.in_forward: Block | None = None
        self.in_backward: Block | None = None
        self.backward = -1  # torch's number of the backward that runs
        self.to_come: Counter[Block] = Counter()  # forwards to whose outputs no gradient has come yet
        self.again: list[Block] = []  # entered in this backward to be computed again, before a gradient came

    def watch(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        model.register_forward_pre_hook(self._begin, prepend=True)
        for block in blocks:
            modules = [model.get_submodule(name) for name in block.modules if is_here(model, name)]
            for module in modules:
                module.register_forward_pre_hook(partial(self._enter, block), prepend=True)
            if modules:
                modules[-1].register_forward_hook(partial(self._leave, block))
        model.register_forward_hook(self._end, always_call=True)

    @uncompiled(_REASON)
    def _begin(self, *_: Any) -> None:
        if _backward() == -1:
            self._abandon_failed()
            self.store.enter(self.root)

    @uncompiled(_REASON)
    def _enter(self, block: Block, *_: Any) -> None:
        if _backward() != -1:
            self._enter_again(block)
            return
        if self.in_forward == block:
            return
        self._abandon_failed()
        self._leave_open()
        self.in_forward = block
        self.store.enter(block)

    def _enter_again(self, block: Block) -> None:
        """A block is computed again, maybe by the backward of several blocks at once, which goes on."""
        if self.in_backward == block or block in self.again:
            return
        self._begin_backward()
        self.again.append(block)
        self.store.enter(block, backward=True)

    def _leave_open(self) -> None:
        """A block that is still entered is one that raised, or whose last module was not called."""
        if self.in_forward is not None:
            self.store.leave(self.in_forward)
            self.in_forward = None

    @uncompiled(_REASON)
    def _leave(self, block: Block, module: nn.Module, inputs: Any, output: Any) -> None:
        if _backward() == -1:
            self.in_forward = None
            self.store.leave(block, returns=self._returns(output, block))

    @uncompiled(_REASON)
    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if _backward() == -1:
            self._leave_open()
            self.store.leave(self.root, returns=self._returns(output, self.root))

    def _returns(self, output: Any, block: Block) -> bool:
        """Whether a backward may come to the block, which is then entered.

        What a block passes on as an earlier one has left it is that one's: hooks of one tensor run in the order in
        which they came, and the earlier block would be entered before the later one.
        """
        made = [x for x in _tensors(output) if x.requires_grad] if torch.is_grad_enabled() else []
        if block != self.root:
            made = [x for x in made if getattr(x, _LEFT, None) is None or getattr(x, _LEFT) is not x.grad_fn]
            for x in made:
                setattr(x, _LEFT, x.grad_fn)
        if made:
            self.to_come[block] += 1
            torch.autograd.graph.register_multi_grad_hook(made, lambda _: self._reached(block), mode="any")
        return bool(made)

    def _reached(self, block: Block) -> None:
        """A gradient of a block's outputs is there."""
        self.to_come[block] = max(0, self.to_come[block] - 1)
        if block in self.again:
            self.again.remove(block)
        self._enter_backward(block)

    def _begin_backward(self) -> None:
        if self.backward != _backward():
            self._abandon_failed()
            self.backward = _backward()
            Variable._execution_engine.queue_callback(self._end_backward)
            self.store.enter(self.root, backward=True)

    def _enter_backward(self, block: Block) -> None:
        self._begin_backward()
        if block == self.root:
            return
        if self.in_backward is not None:
            self.store.leave(self.in_backward, backward=True)
        self.in_backward = block
        self.store.enter(block, backward=True)

    def _end_backward(self) -> None:
        for block in (self.in_backward, *self.again):
            if block is not None:
                self.store.leave(block, backward=True)
        self._forget()
        self.store.leave(self.root, backward=True)

    def _forget(self) -> None:
        """No backward runs."""
        self.in_backward, self.backward = None, -1
        self.again = []

    def _abandon_failed(self) -> None:
        """A backward that did not end has raised."""
        if self.backward != -1:
            self._forget()
            self.store.abandon()


def _backward() -> int:
    """torch's number of the backward that runs on this thread, -1 where none does."""
    return torch._C._current_graph_task_id()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = tuple(vars(value).values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, (tuple, list)) else []
