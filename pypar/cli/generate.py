"""``pypar generate``: sample text from a checkpoint."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from pypar.train import checkpoint
from pypar.train.data.tokens import check_text
from pypar.train.preflight import check_whole_model

SUMMARY = "sample text from a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint (step_...) or a run's folder (its newest one)"
    )
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new tokens (default 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 = always the likeliest (default 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0)


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    if arguments.tokens < 1:
        raise ValueError(f"--tokens ({arguments.tokens}) must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature ({arguments.temperature}) must be at least 0 and finite")
    check_text("--prompt", arguments.prompt)
    path = checkpoint.resolve(arguments.checkpoint)
    check_whole_model(path)

    def job() -> int:
        from pypar.train.generate import generate, printable

        text = generate(
            path,
            arguments.prompt,
            arguments.tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
        print(printable(text, arguments.prompt))
        return 0

    return job
