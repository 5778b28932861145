"""Launches the contenders in turn, and says what each took."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pypar.bench.figures import Figure
from pypar.bench.training.contenders import CONTENDERS, Steps, Workload
from pypar.bench.training.sharded import SHARDED
from pypar.comm.backend import BACKENDS
from pypar.train.metrics import matmul_rate
from pypar.train.precision import PRECISIONS

ALL: dict[str, tuple[int, Steps]] = CONTENDERS | SHARDED
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


def race(names: Sequence[str], workload: Workload, *, steps: int, rounds: int) -> dict[str, Result]:
    """Results by name. Contenders take turns, so a machine that drifts drifts for all; the first step warms up.

    A peer that cannot run here (torch.compile without a compiler) has a failure; AssertionError where the losses of
    those that run differ.
    """
    workload.data()  # tokenised once, before any rank asks for it
    results = {name: Result() for name in names}
    for _ in range(rounds):
        for name, result in results.items():
            if result.failure:
                continue
            try:
                losses, seconds, peak = _launch(name, workload, steps)
            except mp.ProcessRaisedException as error:
                if name.startswith("pypar"):
                    raise
                result.failure = str(error).strip().splitlines()[-1]
                continue
            result.losses, result.peak_bytes = losses, max(peak, result.peak_bytes)
            result.seconds += seconds
            print(f"  {name}: {', '.join(f'{s:.2f}' for s in seconds)} s", file=sys.stderr)
    _compare({name: r.losses for name, r in results.items() if not r.failure}, _SAME[workload.precision])
    return results


def _compare(losses: dict[str, list[float]], tolerance: float) -> None:
    first = next(iter(losses))
    for name, own in losses.items():
        differ = f"{name} has the losses {own}, {first} has {losses[first]}"
        torch.testing.assert_close(own, losses[first], rtol=tolerance, atol=0, msg=differ)


def _launch(name: str, workload: Workload, steps: int) -> tuple[list[float], list[float], int]:
    with tempfile.TemporaryDirectory() as directory:
        workload.save_initial_weights(Path(directory, "weights"))
        mp.spawn(_rank, (name, workload, steps, directory), nprocs=ALL[name][0])
        return torch.load(Path(directory, "result"), weights_only=True)


def _rank(rank: int, name: str, workload: Workload, num_steps: int, directory: str) -> None:
    ranks, make = ALL[name]
    join(name, rank, ranks, directory)
    steps = make(Path(directory, "weights"), workload)
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
    leave()


def join(name: str, rank: int, ranks: int, directory: str) -> None:
    """Make this process one of the ranks: pinned to its share of the cores, over the backend that its users have."""
    cores = sorted(os.sched_getaffinity(0))
    own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] or cores
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))
    if ranks > 1:
        backend = BACKENDS["cpu"] if name.startswith("pypar") else "gloo"
        store = dist.FileStore(f"{directory}/store", ranks)
        dist.init_process_group(backend, rank=rank, world_size=ranks, store=store)


def leave() -> None:
    """End this process at once: some peers hang or abort in their exit handlers, which is not what is measured."""
    os._exit(0)


def _peak_bytes() -> int:
    """The most memory that this process has held, its code and torch's own too; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line[:6] == "VmHWM:"), 0)


def figures(results: Mapping[str, Result], workload: Workload, bench: str = "train") -> list[Figure]:
    """The time of a step of each of pypar's contenders beside the fastest peer's among the results."""
    ran = {name: result for name, result in results.items() if not result.failure}
    peer = min((n for n in ran if not n.startswith("pypar")), key=lambda n: ran[n].median, default=None)
    peak = matmul_rate(PRECISIONS[workload.precision], torch.device("cpu"), 2048)
    return [
        Figure(
            bench=bench,
            what=name.removeprefix("pypar, ").removeprefix("pypar "),
            dtype=workload.precision,
            call="step",
            seconds=result.median,
            peer=peer or "no peer",
            peer_seconds=ran[peer].median if peer else None,
            limit="matmul",
            share=workload.flops / result.median / peak,
        )
        for name, result in ran.items()
        if name.startswith("pypar")
    ]
