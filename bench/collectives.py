"""Collectives of the backend "pypar" against gloo's in the same run, after a check of their results.

    python bench/collectives.py [--ranks 2 4] [--dtypes fp32 bf16] [--bytes 1024 65536 1048576 33554432] [--quick]

Through torch.distributed, end to end. A figure is the sustained period: the time of many calls one after another on the
slowest rank, divided by their number; the median of the rounds, in which the backends take turns. GB/s is of the
tensor. Beside it what a copy of that size takes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import pypar.comm  # makes the backend known

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = ("pypar", "gloo")
TARGETS = {  # of all_reduce in fp32: bytes up to which -> times gloo
    2: {64 << 10: 10.0, 1 << 20: 3.0, 32 << 20: 2.0},
    4: {64 << 10: 30.0, 1 << 20: 4.0, 32 << 20: 2.5},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--bytes", type=int, nargs="+", default=[1 << 10, 64 << 10, 1 << 20, 32 << 20])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="of one round of one contender")
    parser.add_argument("--quick", action="store_true", help="one round of 0.05 s")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 0.05
    return arguments


def calls(x: Tensor, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """The collectives on a tensor of x's size: what is reduced, gathered, scattered as a whole."""
    size = dist.get_world_size(group)
    part = torch.empty(x.numel() // size, dtype=x.dtype)
    return {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, x, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(x, part, group=group),
    }


def check(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((4096 * size,), float(rank + 1), dtype=dtype)
    dist.all_reduce(x, group=group)
    part = torch.empty(4096, dtype=dtype)
    dist.reduce_scatter_tensor(part, x, group=group)
    dist.all_gather_into_tensor(x, part, group=group)
    expected = size * sum(range(1, size + 1))
    if not (x == expected).all():
        raise SystemExit(f"{group.name()}: {x[0].item()} where {expected} was expected")


def seconds_a_call(call: Callable[[], object], group: dist.ProcessGroup, seconds: float) -> float:
    """On the slowest rank. The ranks agree on the number of calls first."""
    call()
    started = time.perf_counter()
    call()
    count = torch.tensor([max(1, min(20_000, int(seconds / (time.perf_counter() - started))))])
    dist.all_reduce(count, dist.ReduceOp.MIN)
    dist.barrier(group)
    started = time.perf_counter()
    for _ in range(int(count)):
        call()
    period = torch.tensor([(time.perf_counter() - started) / int(count)])
    dist.all_reduce(period, dist.ReduceOp.MAX)
    return period.item()


def copy_seconds(num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def run(rank: int, size: int, store_path: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, size), rank=rank, world_size=size)
    groups = {backend: dist.new_group(backend=backend) for backend in BACKENDS}
    for name in arguments.dtypes:
        for group in groups.values():
            check(group, DTYPES[name])
        for num_bytes in arguments.bytes:
            x = torch.zeros(num_bytes // DTYPES[name].itemsize // size * size, dtype=DTYPES[name])
            by_backend = {backend: calls(x, group) for backend, group in groups.items()}
            for what in by_backend["gloo"]:
                times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
                for _ in range(arguments.rounds):
                    for backend, group in groups.items():
                        period = seconds_a_call(by_backend[backend][what], group, arguments.seconds)
                        times[backend].append(period)
                if rank == 0:
                    print_row(size, what, name, num_bytes, [statistics.median(times[b]) for b in BACKENDS])
    dist.barrier()
    dist.destroy_process_group()


def print_row(size: int, what: str, dtype: str, num_bytes: int, periods: list[float]) -> None:
    ours, gloo = periods
    target = ""
    if what == "all_reduce" and dtype == "fp32" and size in TARGETS:
        aim = next((v for k, v in TARGETS[size].items() if num_bytes <= k), 0.0)
        target = f"  target {aim:.1f}x" if aim else ""
    print(
        f"{size} ranks  {what:14}  {dtype}  {num_bytes:>9} B  pypar {ours * 1e6:9.1f} us  "
        f"{num_bytes / ours / 1e9:6.2f} GB/s  gloo {gloo * 1e6:9.1f} us  {gloo / ours:6.2f}x  "
        f"copy {copy_seconds(num_bytes) * 1e6:8.1f} us{target}",
        flush=True,
    )


def main() -> None:
    arguments = parse_arguments()
    print(f"torch {torch.__version__}, backend {pypar.comm.cpu_group.NAME} against its gloo", flush=True)
    for size in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run, (size, str(Path(folder) / "store"), arguments), nprocs=size)


if __name__ == "__main__":
    main()
