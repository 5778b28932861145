"""Steps of training through `pypar.zero` on this rank, and the same on one process in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import pypar
from pypar.grid import Grid
from pypar.layout import Layout, answers_for, assemble, boxes
from pypar.mesh import Mesh
from tests.data_parallel.zero.trees import HALF

# Options of `pypar.zero` by the names that tests give them.
STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 keeps": {"stage": 3, "reshard": False},
}

# eps: gradients at the level of rounding are not divided by themselves.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, eps=1e-3, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
}


# Sums of other rounding than one process's, and values that are rounded to bf16 on the way.
CLOSE, CLOSE_IN_HALF = 2e-5, 2e-2


class Work(Protocol):
    """What is trained: it travels to ranks, and makes the same model on each."""

    def model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, rank: int, step: int, microbatch: int) -> Tensor: ...


@dataclass(frozen=True)
class Script:
    """How the steps are made, beside what `pypar.zero` is told."""

    num_microbatches: int = 1
    optimizer: str = "adamw"
    clip: float = 0.5
    num_steps: int = 3


@dataclass
class Steps:
    """What one rank saw: parts by name of what is owned (gradients: of each step), and where the parts belong."""

    rank: int
    grid: Grid
    layouts: dict[str, Layout]
    losses: list[list[float]] = field(default_factory=list)  # of each step's microbatches
    norms: list[float] = field(default_factory=list)  # of each step's gradients, before they are clipped
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what -> name -> part


def train(
    work: Work, sizes: Mapping[str, int], options: Mapping[str, Any], script: Script = Script()
) -> Steps:
    """In each rank: some steps of the script that the documentation of `pypar.zero` shows."""
    model = work.model()
    mesh = Mesh(**sizes)
    store = pypar.zero(model, mesh, **options)
    updates = OPTIMIZERS[script.optimizer](list(store.parameters()))
    owned = store.owned()
    seen = Steps(mesh.data.rank, store.mesh.grid, {each.name: each.layout for each in owned})
    for step in range(script.num_steps):
        losses = []
        for microbatch in range(script.num_microbatches):
            with store.accumulate() if microbatch < script.num_microbatches - 1 else nullcontext():
                loss = work.loss(model, mesh.data.rank, step, microbatch)
                loss.backward()
            losses.append(loss.item())
        seen.losses.append(losses)
        seen.parts[f"gradient of step {step}"] = {each.name: each.gradient.clone() for each in owned}
        seen.norms.append(store.clip_grad_norm(script.clip).item())
        updates.step()
        store.publish()
        store.zero_grad()
    seen.parts["master"] = {each.name: each.master.detach().clone() for each in owned}
    for each, parameter in zip(owned, store.parameters(), strict=True):
        for key, value in updates.state[parameter].items():
            if value is not None and value.shape == each.master.shape and key != "step":
                seen.parts.setdefault(key, {})[each.name] = value.clone()
    with store.gathered():
        seen.parts["parameter"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return seen


def wholes(results: Sequence[Steps]) -> dict[str, dict[str, Tensor]]:
    """Whole tensors from the parts of all ranks; AssertionError where an element is counted by no rank or by two."""
    grid, layouts = results[0].grid, results[0].layouts
    for name, layout in layouts.items():
        counted = torch.zeros(layout.global_shape)
        for rank in range(grid.num_ranks):
            for box in boxes(layout, grid, rank) if answers_for(layout, grid, rank) else ():
                counted[box.slices] += 1
        assert (counted == 1).all(), f"{name}, {layout}, is counted so often: {counted}"
    whole: dict[str, dict[str, Tensor]] = {"parameter": results[0].parts["parameter"]}
    for what, parts in results[0].parts.items():
        if what != "parameter":
            whole[what] = {
                name: assemble([each.parts[what][name] for each in results], layouts[name], grid)
                for name in parts
            }
    return whole


def assert_same_bits(results: Sequence[Steps], expected: Sequence[Steps]) -> None:
    """Losses, norms, gradients, masters, moments and parameters of two ways to train are the same bits."""
    for one, other in zip(results, expected, strict=True):
        assert one.losses == other.losses, f"losses of rank {one.rank}: {one.losses}, not {other.losses}"
        assert one.norms == expected[0].norms, (
            f"norms of rank {one.rank}: {one.norms}, not {expected[0].norms}"
        )
        for name, parameter in one.parts["parameter"].items():
            assert torch.equal(parameter, results[0].parts["parameter"][name]), f"ranks differ in {name}"
    found, wanted = wholes(results), wholes(expected)
    assert found.keys() == wanted.keys()
    for what in found:
        assert found[what].keys() == wanted[what].keys(), what
        for name, tensor in found[what].items():
            assert tensor.dtype == wanted[what][name].dtype, f"{what}, {name}: {tensor.dtype}"
            assert torch.equal(tensor, wanted[what][name]), (
                f"{what}, {name}:\n{tensor}\nnot\n{wanted[what][name]}"
            )


def train_alone(
    work: Work, num_ranks: int, script: Script = Script(), dtype: torch.dtype | None = None
) -> tuple[list[list[list[float]]], list[float], dict[str, dict[str, Tensor]]]:
    """The same steps by one process, which sees the data of all ranks: losses by rank, norms, whole tensors.

    Masters and gradients are fp32; the model and its inputs are in `dtype`, or the parameters in their own.
    """
    model = work.model()
    masters = {
        n: p.detach().float().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad
    }
    computed = copy.deepcopy(model)
    if dtype is not None:
        computed.to(dtype).register_forward_pre_hook(lambda _, given: tuple(x.to(dtype) for x in given))
    updates = OPTIMIZERS[script.optimizer](list(masters.values()))
    losses: list[list[list[float]]] = [[] for _ in range(num_ranks)]
    norms, whole = [], {}
    for step in range(script.num_steps):
        sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        for rank in range(num_ranks):
            losses[rank].append([])
            for microbatch in range(script.num_microbatches):
                loss = work.loss(computed, rank, step, microbatch)
                losses[rank][-1].append(loss.item())
                loss.backward()
                for name, parameter in computed.named_parameters():
                    if parameter.grad is not None:
                        sums[name] += parameter.grad.float() / num_ranks
                computed.zero_grad()
        for name, master in masters.items():
            master.grad = sums[name]
        whole[f"gradient of step {step}"] = {name: total.clone() for name, total in sums.items()}
        norms.append(nn.utils.clip_grad_norm_(list(masters.values()), script.clip).item())
        updates.step()
        with torch.no_grad():
            for name, parameter in computed.named_parameters():
                if name in masters:
                    parameter.copy_(masters[name])
    whole["master"] = {name: master.detach().clone() for name, master in masters.items()}
    return losses, norms, whole


def assert_close(
    steps: Sequence[Steps], work: Work, script: Script, dtype: torch.dtype | None = None
) -> None:
    """Losses, norms, gradients and masters of all ranks are those of one process."""
    losses, norms, expected = train_alone(work, len(steps), script, dtype)
    found = wholes(steps)
    # bf16's rounding is taken by a step of the weights, not by the first gradients.
    in_half = dtype is not None or any(p.dtype == HALF for p in found["parameter"].values())
    later = CLOSE_IN_HALF if in_half else CLOSE
    for one, own in zip(steps, losses, strict=True):
        torch.testing.assert_close(one.losses[0], own[0], rtol=CLOSE, atol=0)
        torch.testing.assert_close(one.losses, own, rtol=later, atol=0)
        torch.testing.assert_close(one.norms, norms, rtol=later, atol=0)
    for what, tensors in expected.items():
        tolerance = CLOSE if what == "gradient of step 0" else later
        largest = max(float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel())
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[what][name], tensor, rtol=0, atol=tolerance * largest)
