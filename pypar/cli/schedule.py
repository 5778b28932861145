"""``pypar schedule``: draw a pipeline schedule and say what it costs."""

import argparse
from collections.abc import Callable

SUMMARY = "draw a pipeline schedule with its bubble and what it holds in memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="such as one_f_one_b or gpipe")
    parser.add_argument("--ranks", type=int, default=4, help="size of the pp axis (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="of one step (default 8)")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    from pypar.pipeline_parallel import catalog
    from pypar.pipeline_parallel.picture import picture_of

    schedule = catalog.build(arguments.name, arguments.ranks, arguments.microbatches)

    def job() -> int:
        print(picture_of(schedule))
        return 0

    return job
