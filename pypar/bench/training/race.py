"""Launches the contenders in turn, and says what each took."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pypar.bench.figures import Figure
from pypar.bench.training.contenders import (
    CONTENDERS,
    LENGTH,
    SEQUENCES,
    SIZES,
    prepare_data,
    save_initial_weights,
)
from pypar.train.metrics import matmul_rate
from pypar.train.precision import PRECISIONS

TOKENS = SEQUENCES * LENGTH  # of a step
FLOPS = TOKENS * SIZES.flops_per_token(LENGTH)  # of a step
_SAME = {"fp32": 1e-4, "bf16": 5e-3}  # losses of all contenders, relative


@dataclass
class Result:
    """seconds: of each timed step of all rounds. peak_bytes: of the rank that needed most. failure: why it has none."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def race(names: Sequence[str], precision: str, *, steps: int, rounds: int) -> dict[str, Result]:
    """Results by name. Contenders take turns, so a machine that drifts drifts for all; the first step warms up.

    A peer that cannot run here (torch.compile without a compiler) has a failure; AssertionError where the losses of
    those that run differ.
    """
    prepare_data()
    results = {name: Result() for name in names}
    for _ in range(rounds):
        for name, result in results.items():
            if result.failure:
                continue
            try:
                losses, seconds, peak = _launch(name, precision, steps)
            except mp.ProcessRaisedException as error:
                if name.startswith("pypar"):
                    raise
                result.failure = str(error).strip().splitlines()[-1]
                continue
            result.losses, result.peak_bytes = losses, max(peak, result.peak_bytes)
            result.seconds += seconds
            print(f"  {name}: {', '.join(f'{s:.2f}' for s in seconds)} s", file=sys.stderr)
    _compare({name: r.losses for name, r in results.items() if not r.failure}, _SAME[precision])
    return results


def _compare(losses: dict[str, list[float]], tolerance: float) -> None:
    first = next(iter(losses))
    for name, own in losses.items():
        differ = f"{name} has the losses {own}, {first} has {losses[first]}"
        torch.testing.assert_close(own, losses[first], rtol=tolerance, atol=0, msg=differ)


def _launch(name: str, precision: str, steps: int) -> tuple[list[float], list[float], int]:
    with tempfile.TemporaryDirectory() as directory:
        save_initial_weights(Path(directory, "weights"))
        mp.spawn(_rank, (name, precision, steps, directory), nprocs=CONTENDERS[name][0])
        return torch.load(Path(directory, "result"), weights_only=True)


def _rank(rank: int, name: str, precision: str, num_steps: int, directory: str) -> None:
    """Each rank is pinned to its share of the cores."""
    ranks, make = CONTENDERS[name]
    cores = sorted(os.sched_getaffinity(0))
    own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] or cores
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))
    if ranks > 1:
        store = dist.FileStore(f"{directory}/store", ranks)
        dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    steps = make(Path(directory, "weights"), precision)
    losses, seconds = [next(steps)], []
    for _ in range(num_steps):
        if ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        losses.append(next(steps))
        seconds.append(time.perf_counter() - start)
    peak = torch.tensor([_peak_bytes()])
    if ranks > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save((losses, seconds, int(peak)), f"{directory}/result")
    if ranks > 1:
        dist.barrier()
    os._exit(0)  # some peers' processes hang or abort in their exit handlers: not what is measured


def _peak_bytes() -> int:
    """The most memory that this process has held, its code and torch's own too; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line[:6] == "VmHWM:"), 0)


def figures(names: Sequence[str], precision: str, *, steps: int, rounds: int) -> list[Figure]:
    """The time of a step of each of pypar's layouts among these beside the fastest peer's among them."""
    results = {n: r for n, r in race(names, precision, steps=steps, rounds=rounds).items() if not r.failure}
    peer = min((n for n in results if n.startswith("torch")), key=lambda n: results[n].median)
    peak = matmul_rate(PRECISIONS[precision], torch.device("cpu"), 2048)
    return [
        Figure(
            bench="train",
            what=name.removeprefix("pypar, ").removeprefix("pypar "),
            dtype=precision,
            call="step",
            seconds=result.median,
            peer=peer,
            peer_seconds=results[peer].median,
            limit="matmul",
            share=FLOPS / result.median / peak,
        )
        for name, result in results.items()
        if not name.startswith("torch")
    ]
