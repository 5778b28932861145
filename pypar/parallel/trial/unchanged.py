"""Runs of a model that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Let anything happen to the model, and then give every module the attributes, children, parameters, buffers, hooks
    and training mode that it had, every buffer its values, and torch its random state.

    Inside the model is in eval mode. What a forward changes in place in lists and objects of its own is not undone,
    nor are values of parameters.
    """
    before = []
    for attributes in map(vars, model.modules()):
        inner = [(held, dict(held)) for held in attributes.values() if isinstance(held, dict)]
        before.append((attributes, dict(attributes), inner))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    with torch.random.fork_rng(devices=_gpus(model)):
        try:
            for module in model.modules():
                module.training = False
            yield
        finally:
            for attributes, values, inner in before:
                attributes.clear()
                attributes.update(values)
                for held, items in inner:
                    held.clear()
                    held.update(items)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)  # .data: a graph of the user's that holds the buffer stays valid


def seed(model: nn.Module) -> None:
    """Start the generators of the CPU and of the model's GPUs anew; torch.manual_seed would reach other GPUs too."""
    torch.default_generator.manual_seed(0)
    for index in _gpus(model):
        torch.cuda.default_generators[index].manual_seed(0)


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.get_device() for p in model.parameters() if p.is_cuda})


@contextmanager
def noise(model: nn.Module) -> Iterator[None]:
    """Give noise to the parameters that have one value everywhere, and then that value again.

    Norms of ones, gates and biases of zeros would hide whose they are, and what comes behind them.
    """
    generator = torch.Generator().manual_seed(0)
    before = []
    for parameter in model.parameters():
        x = parameter.data
        if x.is_floating_point() and _is_constant(x):
            before.append((x, x.clone()))
            scale = 0.1 if x.dim() < 2 else 0.5 / x.shape[-1] ** 0.5
            x.add_((torch.randn(x.shape, generator=generator) * scale).to(x))
    try:
        yield
    finally:
        for x, value in before:
            x.copy_(value)


def _is_constant(x: Tensor) -> bool:
    few = x.flatten()[:16]  # nearly always enough to say no
    return bool(x.numel() and (few == few[0]).all() and (x == few[0]).all())
