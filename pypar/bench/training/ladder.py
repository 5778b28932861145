"""The largest decoder that trains within the memory of a rank, for each way to cut its states, by formula.

A model grows by layers. Its states, and what of them comes and goes, are those of `pypar.cost.memory`; what a
microbatch needs beside them is measured on decoders of one and of two layers, and grows by the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pypar.bench.training.contenders import Workload
from pypar.bench.training.sharded import RANKS, STAGES, Running
from pypar.bench.training.timeline import record
from pypar.cost.memory import ADAM, Parameter, Sharding, Units, peaks, states
from pypar.models import Decoder
from pypar.train.precision import PRECISIONS


@dataclass(frozen=True)
class Rung:
    """A way to cut states, and the largest decoder that fits with it: layers, parameters, predicted bytes."""

    name: str
    stage: int
    num_layers: int
    num_parameters: int
    num_bytes: int


def with_layers(workload: Workload, num_layers: int) -> Workload:
    return replace(workload, sizes=replace(workload.sizes, num_layers=num_layers))


def units_of(workload: Workload) -> Units:
    """The decoder's blocks by the shapes of their parameters; all layers are alike, and one is made, without memory."""
    dtype = PRECISIONS[workload.precision]
    with torch.device("meta"):
        model = Decoder(with_layers(workload, 1).sizes, seed=None, dtype=dtype)
    embedding, layer, head = (
        [
            Parameter(tuple(p.shape), dtype.itemsize)
            for name in block.modules
            for p in model.get_submodule(name).parameters()
        ]
        for block in model.blocks()
    )
    return Units([embedding, *[layer] * workload.sizes.num_layers, head])


def states_bytes(workload: Workload, sharding: Sharding) -> int:
    """The most that states take in a step, whole gradients and whole parameters that come and go among them."""
    num_backwards = workload.sequences // sharding.num_ranks
    return sum(peaks(units_of(workload), sharding, ADAM, num_backwards=num_backwards).values())


def beside_states(workload: Workload) -> Callable[[int], int]:
    """Bytes of a microbatch beside the states, by the number of layers; measured on one process."""
    alone = replace(workload, sequences=1)
    grows = []
    stays = 0  # the text
    for count in (1, 2):
        measured = with_layers(alone, count)
        found = record(partial(one_process, measured))
        grows.append(found.peak - found.total[0])
        held = sum(states(units_of(measured), Sharding()).values())
        stays = max(stays, found.total[0] - held)
    one, two = grows
    return lambda num_layers: stays + one + (num_layers - 1) * max(0, two - one)


def one_process(workload: Workload) -> Running:
    """The trainer by itself, on this process."""
    trainer = workload.trainer()

    def steps() -> Iterator[float]:
        while True:
            yield trainer.train_step()["loss"]

    held = {name: n for name, n in states(units_of(workload), Sharding()).items() if n}
    return Running(steps(), trainer.model, lambda: held)


def ladder(workload: Workload, budget_bytes: int, beside: Callable[[int], int]) -> list[Rung]:
    """The largest decoder of each stage, on `RANKS` ranks; beside: see `beside_states`."""
    rungs = []
    for stage in STAGES:
        needs = partial(_needs, workload, Sharding(stage, RANKS), beside)
        if num_layers := _largest(needs, budget_bytes):
            sizes = with_layers(workload, num_layers).sizes
            name = f"ZeRO-{stage}" if stage else "none"
            rungs.append(Rung(name, stage, num_layers, sizes.num_parameters, needs(num_layers)))
    return rungs


def _needs(workload: Workload, sharding: Sharding, beside: Callable[[int], int], num_layers: int) -> int:
    return states_bytes(with_layers(workload, num_layers), sharding) + beside(num_layers)


def _largest(needs: Callable[[int], int], budget_bytes: int) -> int:
    """The most layers that fit; from three on each layer needs the same."""
    three, four = needs(3), needs(4)
    most = max(0, 3 + (budget_bytes - three) // (four - three))
    while most and needs(most) > budget_bytes:
        most -= 1
    while needs(most + 1) <= budget_bytes:
        most += 1
    return most


def draw(path: Path, title: str, rungs: list[Rung]) -> None:
    """A bar for each way to cut: millions of parameters."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 1.2 + 0.5 * len(rungs)), layout="constrained")
    axes: Any = picture.add_subplot()
    places = range(len(rungs), 0, -1)
    axes.barh(places, [rung.num_parameters / 1e6 for rung in rungs], color="#2a7f62")
    axes.set_yticks(places, [rung.name for rung in rungs])
    for place, rung in zip(places, rungs, strict=True):
        text = f" {rung.num_parameters / 1e6:.1f} M, {rung.num_layers} layers"
        axes.text(rung.num_parameters / 1e6, place, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.3 * max(rung.num_parameters for rung in rungs) / 1e6)
    axes.set_xlabel("millions of parameters")
    axes.set_title(title, fontsize=8)
    picture.savefig(path, dpi=120)
