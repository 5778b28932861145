"""``pypar bench``: how fast this machine is with pypar, beside what else is there."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pypar.cli.selftest import check_ops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pypar.bench.figures import Figure

SUMMARY = "measure: everything in one table, or all-reduce alone"
PARTS = ("operators", "communication", "training", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="subject")
    text = "every operator, the collectives, training steps and ZeRO, each beside a named peer, in one table"
    all_ = subjects.add_parser("all", help=text, description=text, allow_abbrev=False)
    all_.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default all of them")
    all_.add_argument("--ops", nargs="+", default=[], metavar="OP", help="such as attention (default all)")
    all_.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of training and memory; default fp32"
    )
    all_.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    all_.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios as bars into a PNG")
    text = "all-reduce: our GPU kernels against NCCL, or on CPUs our backend against gloo"
    allreduce = subjects.add_parser("allreduce", help=text, description=text, allow_abbrev=False)
    allreduce.add_argument(
        "--tune", action="store_true", help="keep the sizes from which which way is the fastest"
    )
    allreduce.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default cuda")
    allreduce.add_argument("--ranks", type=int, nargs="+", help="default all GPUs, up to 8; on CPUs 2")
    allreduce.add_argument(
        "--backend", choices=["cuda", "triton"], help="of the kernels; default the first that runs"
    )
    allreduce.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16", "fp16"], default=["bf16"])
    allreduce.add_argument("--bytes", type=int, nargs="+", help="default 1 KiB to 64 MiB; on CPUs to 1 MiB")
    allreduce.add_argument("--quick", action="store_true", help="one round of 0.05 s a figure")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    return _prepare_all(arguments) if arguments.subject == "all" else _prepare_allreduce(arguments)


def _prepare_all(arguments: argparse.Namespace) -> Callable[[], int]:
    check_ops(arguments.ops)
    for option in ("json", "picture"):
        path: Path | None = getattr(arguments, option)
        if path is not None and (
            path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)
        ):
            raise ValueError(f"--{option} ({path}) cannot be written; name a file in a folder that can")

    def job() -> int:
        from pypar.bench import figures
        from pypar.doctor import machine_lines

        machine = list(machine_lines())
        for line in [*machine, "", *figures.header()]:
            print(line, flush=True)
        found = []
        for part in arguments.only:
            for figure in _MEASURED[part](arguments):
                found.append(figure)
                print(figures.line(figure), flush=True)
        if arguments.json is not None:
            figures.write(arguments.json, machine, found)
        if arguments.picture is not None:
            figures.draw(arguments.picture, machine, found)
        return 0

    return job


def _operators(arguments: argparse.Namespace) -> "Iterator[Figure]":
    import torch

    from pypar.selftest import operators
    from pypar.selftest.rows import Options

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return operators.figures(device, Options(ops=tuple(arguments.ops), quick=True))


def _communication(arguments: argparse.Namespace) -> "Iterator[Figure]":
    from pypar.bench import collectives

    sizes = (1 << 10, 64 << 10, 1 << 20, 32 << 20)
    yield from collectives.measure(
        2, collectives.Sweep(("fp32", "bf16"), sizes, rounds=3, seconds=0.05), quiet=True
    )


def _training(arguments: argparse.Namespace) -> "Iterator[Figure]":
    from pypar.bench.training import race
    from pypar.bench.training.contenders import Workload

    names = ["torch, one process", "torch DDP", "pypar, one process", "pypar dp=2", "pypar tp=2"]
    workload = Workload(arguments.precision)
    yield from race.figures(race.race(names, workload, steps=2, rounds=1), workload)


def _memory(arguments: argparse.Namespace) -> "Iterator[Figure]":
    from pypar.bench.training import race
    from pypar.bench.training.contenders import Workload

    names = ["torch FSDP2", *(f"pypar zero {stage}" for stage in range(4))]
    workload = Workload(arguments.precision, sequences=4)
    yield from race.figures(race.race(names, workload, steps=2, rounds=1), workload, "memory")


_MEASURED = dict(zip(PARTS, (_operators, _communication, _training, _memory), strict=True))


def _prepare_allreduce(arguments: argparse.Namespace) -> Callable[[], int]:
    import torch

    from pypar.bench import allreduce, collectives

    on_cpu = arguments.device == "cpu"
    if on_cpu and (arguments.tune or arguments.backend):
        raise ValueError("--tune and --backend are about GPU kernels; leave --device cpu out")
    reason = None if on_cpu else allreduce.refusal()
    most = 8 if on_cpu or reason else min(torch.cuda.device_count(), 8)
    for num_ranks in arguments.ranks or []:
        if not 2 <= num_ranks <= most:
            raise ValueError(f"--ranks ({num_ranks}) must be 2 to {most} here; give numbers in that range")
    sizes = arguments.bytes or [4**k << 10 for k in range(6 if on_cpu else 9)]
    for num_bytes in sizes:
        if num_bytes < 64 or num_bytes % 64:
            raise ValueError(
                f"--bytes ({num_bytes}) must be a positive multiple of 64; use {num_bytes // 64 * 64 + 64}"
            )
    sweep = collectives.Sweep(tuple(arguments.dtypes), tuple(sizes), ("all_reduce",))
    if arguments.quick:
        sweep = collectives.Sweep(sweep.dtypes, sweep.sizes, sweep.collectives, 1, 0.05)

    def job() -> int:
        if reason is not None:
            print(f"pypar bench: {reason}", file=sys.stderr)
            return 1
        for num_ranks in arguments.ranks or [2 if on_cpu else most]:
            if on_cpu:
                collectives.measure(num_ranks, sweep)
            else:
                allreduce.measure(num_ranks, sweep, arguments.backend, arguments.tune)
        return 0

    return job
