"""CPU collectives of the backend "pypar" against gloo's in the same run, after a check of their results.

Through torch.distributed, end to end. A figure is the sustained period: the time of many calls one after another on the
slowest rank, divided by their number; the median of the rounds, in which the backends take turns. GB/s is of the
tensor. Beside it what a copy of that size takes on one core.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import pypar.comm  # noqa: F401  makes the backend known
from pypar.bench.figures import Figure
from pypar.bench.timing import DTYPES, median_seconds

BACKENDS = ("pypar", "gloo")
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
TARGETS = {  # of all_reduce in fp32: bytes up to which -> times gloo
    2: {64 << 10: 10.0, 1 << 20: 3.0, 32 << 20: 2.0},
    4: {64 << 10: 30.0, 1 << 20: 4.0, 32 << 20: 2.5},
}

# torch 2.13 renamed both and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Sweep:
    """What is measured. sizes: bytes of the tensors. seconds: of one round of one contender."""

    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    collectives: tuple[str, ...] = COLLECTIVES
    rounds: int = 5
    seconds: float = 0.25


def measure(num_ranks: int, sweep: Sweep, *, quiet: bool = False) -> list[Figure]:
    """Starts the ranks; a figure for each collective, dtype and size, which rank 0 prints unless it is to be quiet."""
    rows = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_run, num_ranks, sweep, rows, quiet)
    return [rows.get() for _ in range(len(sweep.collectives) * len(sweep.dtypes) * len(sweep.sizes))]


def spawn(run: Callable[..., None], num_ranks: int, *arguments: object) -> None:
    """run(rank, num_ranks, path of a file for a store, *arguments) in a process for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            run, (num_ranks, str(Path(folder) / "store"), *arguments), nprocs=num_ranks
        )


def calls(x: Tensor, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """The collectives on a tensor of x's size: what is reduced, gathered, scattered as a whole."""
    part = torch.empty(x.numel() // dist.get_world_size(group), dtype=x.dtype)
    return {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "reduce_scatter": lambda: _reduce_scatter(part, x, group=group),
        "all_gather": lambda: _all_gather(x, part, group=group),
    }


def check(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """SystemExit where the group's results are wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((4096 * size,), float(rank + 1), dtype=dtype)
    dist.all_reduce(x, group=group)
    part = torch.empty(4096, dtype=dtype)
    _reduce_scatter(part, x, group=group)
    _all_gather(x, part, group=group)
    expected = size * sum(range(1, size + 1))
    if not (x == expected).all():
        raise SystemExit(f"{group.name()}: {x[0].item()} where {expected} was expected")


def seconds_a_call(
    call: Callable[[], object], seconds: float, finish: Callable[[], object] = lambda: None
) -> float:
    """On the slowest rank; the default group takes CPU tensors. finish: waits until what was called has run."""
    call()
    finish()
    started = time.perf_counter()
    call()
    finish()
    count = torch.tensor([max(1, min(20_000, int(seconds / (time.perf_counter() - started))))])
    dist.all_reduce(count, dist.ReduceOp.MIN)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(int(count)):
        call()
    finish()
    period = torch.tensor([(time.perf_counter() - started) / int(count)])
    dist.all_reduce(period, dist.ReduceOp.MAX)
    return period.item()


def copy_seconds(num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return median_seconds({"copy": lambda: target.copy_(source)}, rounds=7)["copy"]


def _run(rank: int, size: int, store_path: str, sweep: Sweep, rows: SimpleQueue[Figure], quiet: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, size), rank=rank, world_size=size)
    groups = {backend: dist.new_group(backend=backend) for backend in BACKENDS}
    for name in sweep.dtypes:
        for group in groups.values():
            check(group, DTYPES[name])
        for num_bytes in sweep.sizes:
            x = torch.zeros(num_bytes // DTYPES[name].itemsize // size * size, dtype=DTYPES[name])
            by_backend = {backend: calls(x, group) for backend, group in groups.items()}
            for what in sweep.collectives:
                times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
                for _ in range(sweep.rounds):
                    for backend in BACKENDS:
                        times[backend].append(seconds_a_call(by_backend[backend][what], sweep.seconds))
                if rank == 0:
                    figure = _figure(size, what, name, num_bytes, times)
                    rows.put(figure)
                    if not quiet:
                        _print_row(size, num_bytes, figure)
    dist.barrier()
    dist.destroy_process_group()


def _figure(size: int, what: str, dtype: str, num_bytes: int, times: dict[str, list[float]]) -> Figure:
    ours, gloo = (statistics.median(times[backend]) for backend in BACKENDS)
    share = copy_seconds(num_bytes) / ours
    return Figure(what, f"{size} ranks, {num_bytes} B", dtype, "call", ours, "gloo", gloo, "copy", share)


def _print_row(size: int, num_bytes: int, figure: Figure) -> None:
    target = ""
    if figure.bench == "all_reduce" and figure.dtype == "fp32" and size in TARGETS:
        aim = next((v for k, v in TARGETS[size].items() if num_bytes <= k), 0.0)
        target = f"  target {aim:.1f}x" if aim else ""
    print(
        f"{size} ranks  {figure.bench:14}  {figure.dtype}  {num_bytes:>9} B  pypar {figure.seconds * 1e6:9.1f} us  "
        f"{num_bytes / figure.seconds / 1e9:6.2f} GB/s  gloo {(figure.peer_seconds or 0.0) * 1e6:9.1f} us  "
        f"{figure.ratio:6.2f}x  copy {(figure.share or 0.0) * figure.seconds * 1e6:8.1f} us{target}",
        flush=True,
    )
