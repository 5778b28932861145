"""What a rank holds in the course of a step: every allocation of torch's, and its states by category.

torch's profiler sees each allocation and each release of torch's own memory; what a backend keeps in shared memory, and
what libraries allocate by themselves, is not in it. Between the marks, at the ends of layers, what is not one of the
states that a contender tells is "activations and the rest". There are marks before and after each layer, forward and
backward, and around what reduces gradients and updates parameters after the last backward.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from pypar.bench.training.contenders import Workload
from pypar.bench.training.race import join, leave
from pypar.bench.training.sharded import RANKS, RUNNING, Running

REST = "activations and the rest"
CATEGORIES = (
    "parameters",
    "masters",
    "gradients",
    "moments",
    "gathered",
    "transient",
    "activations",
    "host",
)  # of those that are told
_MARK = "held at "


@dataclass
class Timeline:
    """Of one step of one rank: seconds since its start, all bytes then, and bytes by category."""

    seconds: list[float] = field(default_factory=list)
    total: list[int] = field(default_factory=list)
    held: list[dict[str, int]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.total)

    @property
    def most(self) -> dict[str, int]:
        """The most bytes of each category, which are not at one time."""
        return {name: max(held.get(name, 0) for held in self.held) for name in (*CATEGORIES, REST)}


def record(make: Callable[[], Running]) -> Timeline:
    """The second step of a contender; in the first one an optimizer makes its states."""
    marks: list[dict[str, int]] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        running = make()
        next(running.steps)

        def mark(*_: Any) -> None:
            with record_function(f"{_MARK}{len(marks)}"):
                marks.append({name: n for name, n in running.held().items() if name in CATEGORIES})

        hooks = _between_layers(running, mark)
        with _around(running.updates, mark):
            mark()
            next(running.steps)
            mark()
        for hook in hooks:
            hook.remove()
    return _read(profiler, marks)


def _between_layers(running: Running, mark: Callable[..., None]) -> list[Any]:
    layers: Any = running.model.layers
    hooks = []

    def mark_gradient(x: Any) -> None:
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda _: mark())

    def before(module: Any, inputs: Any) -> None:
        mark()
        mark_gradient(inputs[0] if inputs else None)  # of the first layer: its backward is over

    def after(module: Any, inputs: Any, output: Any) -> None:
        mark()
        mark_gradient(output)

    for layer in layers.values() if hasattr(layers, "values") else layers:
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    return hooks


@contextlib.contextmanager
def _around(updates: Sequence[tuple[Any, str]], mark: Callable[..., None]) -> Iterator[None]:
    """Inside, there is a mark before and after each call of these functions."""

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mark()
            try:
                return function(*args, **kwargs)
            finally:
                mark()

        return call

    for owner, name in updates:
        setattr(owner, name, marked(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in updates:
            delattr(owner, name)


def _read(profiler: profile, marks: Sequence[dict[str, int]]) -> Timeline:
    """Allocations and marks in the order of time, from the first mark on."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(results.events(), key=lambda event: event.start_ns())
    found, total, start, held = Timeline(), 0, 0, {}
    for event in events:
        name = event.name()
        if name == "[memory]":
            total += event.nbytes()
        elif name.startswith(_MARK):
            held = marks[int(name.removeprefix(_MARK))]
            start = start or event.start_ns()
        else:
            continue
        if start:
            found.seconds.append((event.start_ns() - start) / 1e9)
            found.total.append(total)
            found.held.append(held | {REST: max(0, total - sum(held.values()))})
    return found


def record_ranks(name: str, workload: Workload) -> Timeline:
    """A contender of `sharded.RUNNING`, on all its ranks; what the first one holds."""
    with tempfile.TemporaryDirectory() as directory:
        workload.save_initial_weights(Path(directory, "weights"))
        mp.spawn(_rank, (name, workload, directory), nprocs=RANKS)
        seconds, total, held = torch.load(Path(directory, "result"), weights_only=True)
    return Timeline(seconds, total, held)


def _rank(rank: int, name: str, workload: Workload, directory: str) -> None:
    join(name, rank, RANKS, directory)
    found = record(partial(RUNNING[name], Path(directory, "weights"), workload))
    if rank == 0:
        torch.save((found.seconds, found.total, found.held), f"{directory}/result")
    dist.barrier()
    leave()


def draw(path: Path, title: str, timelines: dict[str, Timeline]) -> None:
    """One picture below the other, all to one scale: bytes by category over the time of a step."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 1.2 + 1.9 * len(timelines)), layout="constrained")
    most = max(timeline.peak for timeline in timelines.values()) / 1e6
    all_axes = picture.subplots(len(timelines), 1, squeeze=False)[:, 0]
    for axes, (name, timeline) in zip(all_axes, timelines.items(), strict=True):
        layers = [[held.get(each, 0) / 1e6 for held in timeline.held] for each in (*CATEGORIES, REST)]
        axes.stackplot(timeline.seconds, layers, labels=(*CATEGORIES, REST), step="post", linewidth=0)
        axes.set_ylim(0, most)
        axes.set_xlim(0, timeline.seconds[-1])
        axes.set_ylabel("MB")
        axes.set_title(f"{name}: at most {timeline.peak / 1e6:,.0f} MB", fontsize=9, loc="left")
    all_axes[0].legend(loc="upper right", fontsize=7, ncols=4)
    all_axes[-1].set_xlabel("seconds of a step, with the profiler beside it")
    picture.suptitle(title, fontsize=8)
    picture.savefig(path, dpi=110)
