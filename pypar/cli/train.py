"""``pypar train``: check, start the ranks of this machine (or join those that torchrun started), train."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pypar.train import checkpoint
from pypar.train.config import RunConfig, load_config
from pypar.train.launch import joined_world_size, launch, launched_here, resume_sentence, run_rank
from pypar.train.preflight import Ready, check

SUMMARY = "train on text: start local ranks, or join the ones torchrun started"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without one, the defaults")
    parser.add_argument("--mesh", help="sizes of the axes, such as tp=2,pp=2")
    parser.add_argument("--name", help="the run is written to runs/<name>")
    parser.add_argument("--data", help="a folder, a glob, a text file or a .jsonl file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any configuration key"
    )
    parser.add_argument("--keys", action="store_true", help="print every configuration key, and end")
    parser.add_argument("--resume", action="store_true", help="go on from this run's last checkpoint, if any")
    parser.add_argument("--overwrite", action="store_true", help="delete the checkpoints of an earlier run")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    if arguments.keys:
        return _show_keys
    flags = {"mesh": arguments.mesh, "name": arguments.name, "data.path": arguments.data}
    given = {key: value for key, value in flags.items() if value is not None}
    if arguments.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        given["train.resume"] = "auto"  # ranks that torchrun starts again go on where they were
    config = load_config(arguments.config, arguments.set, given)
    joined = joined_world_size()
    if (
        arguments.overwrite
        and not launched_here()
        and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    ):
        raise ValueError(
            "--overwrite under torchrun --max-restarts would delete the checkpoints that a restart goes on from; "
            "give the run another --name"
        )
    ready = check(config, joined, overwrite=arguments.overwrite)
    if joined is not None:
        return lambda: _join(ready, arguments.overwrite)
    return lambda: _start(ready, arguments)


def _show_keys() -> int:
    from pypar.train.keys import page

    print(page(), end="")
    return 0


def _join(ready: Ready, overwrite: bool) -> int:
    if not launched_here() and os.environ["RANK"] == "0":
        _show(ready.notes)
        if overwrite:
            _delete_earlier(ready.config)
    run_rank(lambda: _train(ready.config))
    return 0


def _start(ready: Ready, arguments: argparse.Namespace) -> int:
    _show(ready.notes)
    config = ready.config
    if arguments.overwrite:
        _delete_earlier(config)
    if ready.num_ranks == 1:
        _train(config)
        return 0
    threads = config.train.threads or max(1, len(os.sched_getaffinity(0)) // ready.num_ranks)
    return launch(
        arguments.argv,
        ready.num_ranks,
        threads=threads,
        folder=config.run_directory / ".launch",
        resume=lambda: resume_sentence(arguments.argv, checkpoint.latest(config.checkpoint_directory)),
    )


def _show(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _delete_earlier(config: RunConfig) -> None:
    if not config.train.resume:
        shutil.rmtree(config.checkpoint_directory, ignore_errors=True)


def _train(config: RunConfig) -> None:
    from pypar.train.run import run

    run(config)
