"""``pypar selftest``: is what this machine runs right, and how fast is it."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

SUMMARY = "check every operator on every backend of this machine, and compare the times with torch's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="such as attention (default all)")
    parser.add_argument(
        "--backends", nargs="+", default=[], metavar="BACKEND", help="such as native (default all)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("pypar_selftest.json"),
        metavar="FILE",
        help="where the report goes (default pypar_selftest.json)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter timings")


def check_ops(ops: Sequence[str]) -> None:
    """ValueError for a name of --ops that no operator has."""
    from pypar.ops.backend import op_modules, unknown_name

    known = [module.__name__.rsplit(".", 1)[1] for module in op_modules()]
    for name in ops:
        if name not in known:
            raise ValueError(unknown_name("operator", name, known, "--ops: "))


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    from pypar.ops.backend import op_modules, unknown_name

    check_ops(arguments.ops)
    backends = sorted({backend.name for module in op_modules() for backend in module.BACKENDS})
    for name in arguments.backends:
        if name not in backends:
            raise ValueError(unknown_name("backend", name, backends, "--backends: "))
    path = arguments.json
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--json ({path}) cannot be written; name a file in a folder that can")

    def job() -> int:
        from pypar import selftest
        from pypar.doctor import machine_lines

        options = selftest.Options(tuple(arguments.ops), tuple(arguments.backends), arguments.quick)
        return selftest.main(options, list(machine_lines()), path)

    return job
