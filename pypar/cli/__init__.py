"""The command ``pypar``. Each module of this folder is a subcommand of its name:

SUMMARY                     one line for ``pypar --help``
add_arguments(parser)       its arguments
prepare(arguments) -> job   every check; a ``ValueError`` is the user's mistake: one sentence, exit code 2
job() -> exit code          the work; what it raises is shown as it is
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from pypar.train.launch import end_with_launcher, give_up


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pypar`` with ``argv`` (the process's arguments by default); the exit code."""
    end_with_launcher()
    parser = argparse.ArgumentParser(
        prog="pypar", description="Parallel training of transformers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        if not name.startswith("_"):
            command = importlib.import_module(f"{__name__}.{name}")
            subparser = commands.add_parser(
                name, help=command.SUMMARY, description=command.SUMMARY, allow_abbrev=False
            )
            command.add_arguments(subparser)
            subparser.set_defaults(prepare=command.prepare)
    arguments = parser.parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        job = arguments.prepare(arguments)
    except ValueError as error:
        give_up(str(error))
    try:
        return job()
    except KeyboardInterrupt:
        print("pypar: interrupted", file=sys.stderr)
        return 130
