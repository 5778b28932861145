"""Collectives of the backend "pypar" against gloo's in the same run; pypar/bench/collectives.py says what a figure is.

python bench/collectives.py [--ranks 2 4] [--dtypes fp32 bf16] [--bytes 1024 65536 1048576 33554432] [--quick]
"""

import argparse

import torch

from pypar.bench.collectives import Sweep, measure
from pypar.bench.timing import DTYPES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--bytes", type=int, nargs="+", default=[1 << 10, 64 << 10, 1 << 20, 32 << 20])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="of one round of one contender")
    parser.add_argument("--quick", action="store_true", help="one round of 0.05 s")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 0.05
    return arguments


def main() -> None:
    arguments = parse_arguments()
    sweep = Sweep(
        dtypes=tuple(arguments.dtypes),
        sizes=tuple(arguments.bytes),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    print(f"torch {torch.__version__}, backend pypar against its gloo", flush=True)
    for size in arguments.ranks:
        measure(size, sweep)


if __name__ == "__main__":
    main()
