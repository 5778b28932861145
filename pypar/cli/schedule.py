"""``pypar schedule``: draw a pipeline schedule and say what it costs."""

import argparse
from collections.abc import Callable

SUMMARY = "draw a pipeline schedule with its bubble and what it holds in memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the schedule; without it all are listed")
    parser.add_argument("--ranks", type=int, default=4, help="size of the pp axis (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="of one step (default 8)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="an option of the schedule; the list of all schedules names them",
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    from pypar.pipeline_parallel import schedules
    from pypar.pipeline_parallel.picture import picture_of
    from pypar.pipeline_parallel.schedules.registered import options_of

    if arguments.name is None:
        text = "\n".join(map(schedules.explained, schedules.REGISTRY))
    else:
        options = options_of(",".join(arguments.option))
        schedule = schedules.find(arguments.name).build(arguments.ranks, arguments.microbatches, options)
        text = picture_of(schedule)

    def job() -> int:
        print(text)
        return 0

    return job
