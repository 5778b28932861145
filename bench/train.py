"""Training speed of pypar's layouts beside plain PyTorch's, on one machine, in one run.

    python bench/train.py [--precision bf16] [--steps 4] [--rounds 2] [--only NAME ...]

Who takes part, and what they train, is told in pypar/bench/training/contenders.py. Each rank is pinned to its share of
the cores. Each launch makes one warm-up step; the figure is the median over all timed steps of all rounds. Contenders
take turns, so a machine that drifts drifts for all. All of them must report the same losses. The peak memory is that of
the rank's whole process.
"""

import argparse
import functools
import os

import torch

from pypar.bench.timing import median_seconds
from pypar.bench.training.contenders import CONTENDERS, Workload
from pypar.bench.training.race import Result, race
from pypar.ops import linear
from pypar.train.metrics import matmul_rate
from pypar.train.precision import PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a launch")
    parser.add_argument("--rounds", type=int, default=2, help="launches of each contender")
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    options = parser.parse_args()
    names = [n for n in CONTENDERS if not options.only or any(word in n for word in options.only)]
    if not names:
        parser.error(f"--only {' '.join(options.only)}: no such contender; there are {'; '.join(CONTENDERS)}")
    workload = Workload(options.precision)
    report(race(names, workload, steps=options.steps, rounds=options.rounds), workload)


def linear_gain(workload: Workload) -> str:
    """What the choice of a matmul library gains: pypar's linear against torch's at the size of one layer."""
    sizes, dtype = workload.sizes, PRECISIONS[workload.precision]
    x, weight = torch.randn(workload.length, sizes.d_model), torch.randn(sizes.d_ff, sizes.d_model)
    functions = {"ours": linear, "torch": torch.nn.functional.linear}
    contenders = {
        name: functools.partial(function, x.to(dtype), weight.to(dtype))
        for name, function in functions.items()
    }
    seconds = median_seconds(contenders, rounds=30)
    size = f"[{workload.length}, {sizes.d_model}] x [{sizes.d_model}, {sizes.d_ff}]"
    return f"pypar.ops.linear against torch's, forward of {size}: {seconds['torch'] / seconds['ours']:.2f}x"


def report(results: dict[str, Result], workload: Workload) -> None:
    ran = {name: result for name, result in results.items() if not result.failure}
    peers = [result.median for name, result in ran.items() if name.startswith("torch")]
    precision = workload.precision
    peak = matmul_rate(PRECISIONS[precision], torch.device("cpu"), 2048)
    cores = len(os.sched_getaffinity(0))
    print(
        f"torch {torch.__version__}, {cores} cores, {precision} matmul {peak / 1e9:.0f} GFLOP/s with "
        f"{torch.get_num_threads()} threads"
    )
    print(linear_gain(workload))
    print("| contender | tokens/s | GFLOP/s | of matmul | x best torch | spread | peak MB a rank |")
    print("|---|---|---|---|---|---|---|")
    for name, result in ran.items():
        step, rate = result.median, workload.flops / result.median
        spread = (max(result.seconds) - min(result.seconds)) / step
        ratio = f"{min(peers) / step:.2f}" if peers else "-"
        print(
            f"| {name} | {workload.tokens / step:,.0f} | {rate / 1e9:.0f} | {rate / peak:.0%} | {ratio} "
            f"| {spread:.0%} | {result.peak_bytes / 1e6:,.0f} |"
        )
    for name, result in results.items():
        if result.failure:
            print(f"{name} did not run: {result.failure}")


if __name__ == "__main__":
    main()
