"""``pypar doctor``: what was built and what this machine can run."""

import argparse
from collections.abc import Callable

SUMMARY = "what was built, and what this machine can run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    def job() -> int:
        from pypar.doctor import main

        return main() or 0

    return job
