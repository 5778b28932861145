"""``pypar schedule``: what a pipeline schedule costs, beside others, drawn and as lists."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pypar.pipeline_parallel.compare import Estimate, RankCost

SUMMARY = "draw a pipeline schedule with its bubble and what it holds in memory, or compare all"


# What an argument needs that does not go with the others.
_GOES_WITH = {
    "name": "leave --all out",
    "memory": 'name "auto", the schedule that it is a bound for',
    "layers": 'name "auto", the schedule that it is a bound for',
    "ranks": "name a schedule that is made for any number",
    "microbatches": "name a schedule that is made for any number",
    "option": "name one schedule that has it",
    "csv": "name one schedule",
    "json": "name a schedule, or --all",
    "picture": "name a schedule, or --all",
    "cost": "name a schedule, or --all",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        help='the schedule, "auto" for the fastest that a run can have, or a .csv file of actions; without it all are '
        "listed",
    )
    parser.add_argument("--all", action="store_true", help="compare all schedules in a table")
    parser.add_argument("--ranks", type=int, help="size of the pp axis (default 4)")
    parser.add_argument("--microbatches", type=int, help="of one step (default 8)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="an option of the schedule; the list of all schedules names them",
    )
    parser.add_argument(
        "--cost",
        default="",
        metavar="F=1,I=1,W=1,comm=0",
        help="of a microbatch on all layers of a rank: the times of its forward F, input and weight gradient I and W, "
        "whole backward B (I+W), F and B that run as one (pair), recompute (before B or I), update U, and of a message "
        "between ranks (comm); kept: the share of its activations that W needs (default 0.5)",
    )
    parser.add_argument(
        "--memory", type=float, help="with auto: the most activations of a rank, in microbatches"
    )
    parser.add_argument("--layers", type=int, help="with auto: of the model, at least as many as stages")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--picture", metavar="FILE", help="draw it into an .svg or .png file")
    parser.add_argument("--csv", metavar="FILE", help="write the lists of actions into a file")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    from pypar.pipeline_parallel import schedules
    from pypar.pipeline_parallel.compare import RankCost, compared
    from pypar.pipeline_parallel.picture.chart import check_path

    cost = RankCost.parse(arguments.cost)
    if arguments.picture:
        check_path(arguments.picture)
    for name, least in (("memory", 0), ("layers", 1)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} ({value:g}) must be at least {least}; leave it out for no bound")
    for path in filter(None, (arguments.picture, arguments.csv)):
        if Path(path).is_dir() or not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    if (arguments.name or "").endswith(".csv") and not arguments.all:
        _refuse(arguments, "a file of actions", "ranks", "microbatches", "option", "memory", "layers")
    arguments.ranks = 4 if arguments.ranks is None else arguments.ranks
    arguments.microbatches = 8 if arguments.microbatches is None else arguments.microbatches
    if arguments.all:
        _refuse(arguments, "--all", "name", "option", "csv", "memory", "layers")
        estimates = compared(arguments.ranks, arguments.microbatches, cost)
        return lambda: _show(arguments, estimates)
    if arguments.name is None:
        _refuse(arguments, "the list of all schedules", "option", "csv", "json", "picture", "cost")
        text = "\n".join(map(schedules.explained, schedules.REGISTRY))
        return lambda: print(text) or 0
    estimates = [_estimate(arguments, cost)]
    return lambda: _show(arguments, estimates)


def _refuse(arguments: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, "", [], False):
            given = "a name" if name == "name" else f"--{name}"
            raise ValueError(f"{what} does not go with {given}; leave {given} out, or {_GOES_WITH[name]}")


def _estimate(arguments: argparse.Namespace, cost: "RankCost") -> "Estimate":
    """The one schedule that is asked for; an invalid file is an answer for --json, else an error."""
    from pypar.pipeline_parallel.compare import Estimate, choose, estimate, estimate_of
    from pypar.pipeline_parallel.config import AUTO
    from pypar.pipeline_parallel.schedules.registered import options_of
    from pypar.pipeline_parallel.written import read_schedule

    name = arguments.name
    if name == AUTO:
        _refuse(arguments, AUTO, "option")
        stages = math.inf if arguments.layers is None else arguments.layers
        memory = math.inf if arguments.memory is None else arguments.memory
        best, why = choose(arguments.ranks, arguments.microbatches, cost, most_stages=stages, memory=memory)
        print(why, file=sys.stderr)
        return best
    _refuse(arguments, name, "memory", "layers")
    if not name.endswith(".csv"):
        options = options_of(",".join(arguments.option))
        return estimate(name, arguments.ranks, arguments.microbatches, cost, options)
    if not Path(name).is_file():
        raise ValueError(f"there is no file {name}; pypar schedule NAME --csv FILE writes one")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{name} is no text; pypar schedule NAME --csv FILE writes a file of actions"
        ) from None
    schedule = read_schedule(text)
    try:
        return estimate_of(name, schedule, cost)
    except ValueError as fault:
        if not arguments.json:
            raise
        return Estimate(name, schedule, fault=str(fault))


def _show(arguments: argparse.Namespace, estimates: "list[Estimate]") -> int:
    from pypar.pipeline_parallel.compare import table
    from pypar.pipeline_parallel.picture import picture
    from pypar.pipeline_parallel.picture.chart import draw
    from pypar.pipeline_parallel.written import write_schedule

    simulations = {each.name: each.simulation for each in estimates if each.simulation is not None}
    if arguments.json:
        facts = [each.facts for each in estimates]
        print(json.dumps(facts if arguments.all else facts[0], indent=1))
    elif arguments.all:
        print(table(estimates))
    else:
        for simulation in simulations.values():
            print(picture(simulation))
        if estimates[0].refused:
            print(f"note: {estimates[0].refused}")
    if arguments.picture:
        draw(simulations, arguments.picture)
    if arguments.csv and estimates[0].schedule is not None:
        Path(arguments.csv).write_text(write_schedule(estimates[0].schedule), encoding="utf-8")
    return 0
