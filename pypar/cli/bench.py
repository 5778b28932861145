"""``pypar bench``: how fast communication is on this machine."""

import argparse
import sys
from collections.abc import Callable

SUMMARY = "measure all-reduce: our GPU kernels against NCCL, or on CPUs our backend against gloo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", choices=["allreduce"])
    parser.add_argument(
        "--tune", action="store_true", help="keep the sizes from which which way is the fastest"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default cuda")
    parser.add_argument("--ranks", type=int, nargs="+", help="default all GPUs, up to 8; on CPUs 2")
    parser.add_argument(
        "--backend", choices=["cuda", "triton"], help="of the kernels; default the first that runs"
    )
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16", "fp16"], default=["bf16"])
    parser.add_argument("--bytes", type=int, nargs="+", help="default 1 KiB to 64 MiB; on CPUs to 1 MiB")
    parser.add_argument("--quick", action="store_true", help="one round of 0.05 s a figure")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
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
