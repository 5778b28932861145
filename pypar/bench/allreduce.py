"""All-reduce between the GPUs of this machine: our kernels, one-shot and two-shot, against NCCL.

A figure is the sustained period on the slowest rank, as in collectives.py, after a check that all three give the sum.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from pypar.bench.collectives import Sweep, seconds_a_call, spawn
from pypar.bench.timing import DTYPES
from pypar.comm.allreduce import thresholds
from pypar.comm.allreduce.peers import PeerAllReduce
from pypar.comm.allreduce.thresholds import Thresholds

METHODS = ("one-shot", "two-shot", "group")
Row = tuple[int, dict[str, float]]  # bytes; seconds of a call by method


def refusal() -> str | None:
    """Why nothing can be measured on this machine, or None."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        found = "one GPU" if count else "no GPU"
        return f"all-reduce between GPUs needs two of them, and torch finds {found}; --device cpu measures the CPU's"
    return None


def measure(num_ranks: int, sweep: Sweep, backend: str | None, tune: bool) -> None:
    """Starts a rank for each GPU; rank 0 prints a line for each dtype and size, and with tune keeps the thresholds."""
    spawn(_run, num_ranks, sweep, backend, tune)


def _run(rank: int, size: int, store_path: str, sweep: Sweep, backend: str | None, tune: bool) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(store_path, size)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=size)
    peers = PeerAllReduce(max_bytes=max(sweep.sizes), backend=backend)

    def seconds(call: Callable[[], object]) -> float:
        times = [seconds_a_call(call, sweep.seconds, torch.cuda.synchronize) for _ in range(sweep.rounds)]
        peers.check()
        return statistics.median(times)

    rows: list[Row] = []
    if rank == 0:
        print(f"{size} x {torch.cuda.get_device_name()}, kernels: {peers.engine or peers.reason}", flush=True)
    if peers.engine is not None:
        for name in sweep.dtypes:
            for num_bytes in sweep.sizes:
                row = num_bytes, times_of(peers, num_bytes, DTYPES[name], seconds)
                rows.append(row)
                if rank == 0:
                    print(line_of(size, name, row), flush=True)
        if rank == 0:
            print(keep(peers, size, rows) if tune else f"thresholds in use: {peers.thresholds}")
    peers.close()
    dist.barrier()
    dist.destroy_process_group()


def times_of(
    peers: PeerAllReduce,
    num_bytes: int,
    dtype: torch.dtype,
    seconds: Callable[[Callable[[], object]], float],
) -> dict[str, float]:
    """Seconds of a call by method, on all ranks at once, after a check of each. seconds: times a call."""
    x = torch.ones(num_bytes // dtype.itemsize, dtype=dtype, device=peers.device)
    out = torch.empty_like(x)
    found = {}
    for method in METHODS:
        total = peers.all_reduce(x, out, method=method)
        if not (total == peers.num_ranks).all():
            raise RuntimeError(f"{method} of {num_bytes} bytes of {dtype} gave no sum of ones")
        found[method] = seconds(lambda method=method: peers.all_reduce(x, out, method=method))  # type: ignore[misc]
    return found


def line_of(size: int, dtype: str, row: Row) -> str:
    num_bytes, times = row
    cells = "  ".join(f"{name} {times[name] * 1e6:9.1f} us" for name in METHODS)
    ours = min(times["one-shot"], times["two-shot"])
    return f"{size} ranks  all_reduce  {dtype}  {num_bytes:>9} B  {cells}  {times['group'] / ours:5.2f}x of group"


def keep(peers: PeerAllReduce, size: int, rows: list[Row]) -> str:
    """Writes the best thresholds to the cache file and says so."""
    best, path = best_thresholds(rows), thresholds.cache_file()
    name = thresholds.device_name(peers.device)
    thresholds.store(path, name, peers.engine or "", size, best)
    return (
        f"{name}, {size} ranks, {peers.engine}: one-shot up to {best.one_shot_max_bytes} bytes, two-shot up to "
        f"{best.two_shot_max_bytes}; written to {path}"
    )


def best_thresholds(rows: list[Row]) -> Thresholds:
    """The pair that loses least against always choosing right: the least sum of logarithms of the ratios.

    A threshold is a measured size, or 0; ties go to the smaller.
    """
    sizes = [0, *sorted({num_bytes for num_bytes, _ in rows})]
    pairs = [Thresholds(*pair, "measured") for pair in itertools.combinations_with_replacement(sizes, 2)]

    def loss(at: Thresholds) -> float:
        return sum(math.log(times[at.method(num_bytes)] / min(times.values())) for num_bytes, times in rows)

    return min(pairs, key=loss)
