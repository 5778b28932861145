"""A case, checked against float64 and then timed against its peer: what the operators' programs of bench/ print."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from pypar.bench import timing
from pypar.selftest import judge
from pypar.selftest.case import Case, Draw, Function, Inputs

DTYPES = ("fp32", "bf16")


def parse_arguments(text: str) -> argparse.Namespace:
    """--threads and --rounds; sets torch's number of threads. text: the program's docstring."""
    parser = argparse.ArgumentParser(
        description=text.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def print_limit(arguments: argparse.Namespace) -> float:
    """Prints and returns the bytes that this machine moves in a second."""
    rate = timing.copy_rate(rounds=arguments.rounds)
    print(f"{arguments.threads} threads; the machine's limit: a copy of 64 MiB moves {rate / 1e9:.1f} GB/s")
    return rate


def compare(case: Case, traffic: tuple[int, int], rounds: int, copy_rate: float) -> None:
    """Prints a line for each dtype: forward and backward by the backend that is chosen, with time, ratio and GB/s.

    A result that breaks the rule of accuracy is an AssertionError. traffic: the elements of the case's dtype that
    forward and backward must read or write at least. copy_rate: what print_limit found, of which shares are printed.
    """
    for name in DTYPES:
        dtype = timing.DTYPES[name]
        judge.check_case(case, dtype, backend=None)
        inputs = case.inputs(Draw("cpu", dtype, seed=1))
        ours = functools.partial(case.ours, backend=None)
        sides: dict[str, tuple[Function, Inputs]] = {
            "ours": (ours, inputs),
            "plain": (case.peer.call, case.peer.prepare(inputs)),
        }
        cells = []
        for direction, elements in zip(("forward", "backward"), traffic, strict=True):
            contend = _forward if direction == "forward" else _backward
            seconds = timing.best_seconds({key: contend(case, *side) for key, side in sides.items()}, rounds)
            rate = elements * dtype.itemsize / seconds["ours"]
            cells.append(
                f"{direction} {seconds['ours'] * 1e6:8.0f} us, plain {seconds['plain'] * 1e6:8.0f} us, "
                f"{seconds['plain'] / seconds['ours']:5.2f}x, {rate / 1e9:5.1f} GB/s, "
                f"{rate / copy_rate:4.0%} of copy"
            )
        print(f"{case.shape}, {case.name}, {name}: {' | '.join(cells)}", flush=True)


def compare_norms(text: str, case: Callable[..., Case]) -> None:
    """The program of a norm over rows, of whose cases `case` is the maker; text: its docstring.

    What must move at least: x and out forward, dout, x and dx backward; with a residual x, residual, sum and out
    forward, dout, the sum's gradient, the sum and dx backward.
    """
    arguments = parse_arguments(text)
    limit = print_limit(arguments)
    for rows, size in ((4096, 1024), (1024, 4096), (65536, 128), (65536, 64)):
        for residual in (False, True) if size >= 1024 else (False,):
            forward, backward = (4, 4) if residual else (2, 3)
            traffic = forward * rows * size, backward * rows * size
            compare(case((rows, size), residual=residual), traffic, arguments.rounds, limit)


def _forward(case: Case, function: Function, inputs: Inputs) -> Callable[[], object]:
    return lambda: judge.outputs(function, inputs)


def _backward(case: Case, function: Function, inputs: Inputs) -> Callable[[], object]:
    """A call of backward alone, on a graph built once."""
    leaves = judge.leaves(inputs, case.gradients)
    out = function(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    wanted, douts = [leaves[name] for name in case.gradients], judge.draw_douts(outs)
    return lambda: torch.autograd.grad(outs, wanted, douts, retain_graph=True)
