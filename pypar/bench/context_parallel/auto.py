"""The method "auto" beside the others: what it expects of each, what it chose, and how near the best it came.

Each rank measures its axis once, as a user would, before anything is timed. As a program of its own: steps of each
method and nothing beside them, so that a run is short.
"""

from __future__ import annotations

import argparse

import torch

from pypar.bench.context_parallel.step import Contender, Problem, timed_step
from pypar.bench.context_parallel.workers import Workers
from pypar.bench.timing import DTYPES
from pypar.context_parallel import measure_costs
from pypar.context_parallel.auto.choose import cheapest, method_costs
from pypar.context_parallel.auto.volume import Sizes
from pypar.context_parallel.layouts import segments_of
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.methods.hybrid import default_size
from pypar.mesh import Axis
from pypar.ops.attention.arguments import UNBOUNDED

LIMIT = 1.1  # auto / best, at most


TURN_S = 0.1  # short steps are run this long at a time


def main(arguments: argparse.Namespace) -> str | None:
    """Why it failed."""
    missed = 0
    for size in arguments.ranks:
        with Workers(size, arguments.backend) as workers:
            for dtype in arguments.dtypes:
                workers.ranks(measured, DTYPES[dtype])
                for length in arguments.lengths:
                    problem = Problem(length, DTYPES[dtype], not arguments.full, window=arguments.window)
                    methods = [m for m in arguments.methods if m != "hybrid" or size >= 4]
                    times = _times(workers, problem, methods, arguments.rounds)
                    expectation = workers.ranks(expected, problem, "zigzag")[0]
                    line, kept = verdict(times, expectation, size, problem)
                    print(line, flush=True)
                    missed += not kept
    return failure(missed)


def failure(missed: int) -> str | None:
    return f"auto took more than {LIMIT} of the best, beyond the spread, {missed} times" if missed else None


def _times(
    workers: Workers, problem: Problem, methods: list[str], rounds: int
) -> dict[Contender, list[float]]:
    """Seconds of each step."""

    def step(contender: Contender) -> float:
        ranks = workers.ranks(timed_step, problem, contender)
        return max(t.ended for t in ranks) - min(t.began for t in ranks)

    contenders = [Contender(method) for method in methods]
    turn = max(1, int(TURN_S / max(step(contender) for contender in contenders)))
    times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            times[contender] += [step(contender) for _ in range(turn)]
    return times


def measured(axis: Axis, dtype: torch.dtype) -> str:
    return str(measure_costs(axis, dtype=dtype))


def expected(axis: Axis, problem: Problem, layout: str) -> tuple[dict[str, float], str]:
    """Seconds of a step by each method, and the one that auto takes, by the names of `named`."""
    held = tuple(segments_of(problem.length, rank, axis.size, layout) for rank in range(axis.size))
    sizes = Sizes(1, problem.N, problem.G, problem.H, problem.H, problem.dtype)
    left = UNBOUNDED if problem.window is None else problem.window
    ends = (0, problem.length)
    mask = Mask(left, 0 if problem.causal else UNBOUNDED, ends, ends)
    table = method_costs(sizes, held, held, mask, measure_costs(axis, dtype=problem.dtype))
    seconds = {cost.name: cost.forward_s + cost.backward_s for cost in table if cost.refused is None}
    return seconds, cheapest(table, backward=True).name


def named(method: str, size: int, problem: Problem) -> str:
    """The name that the table of costs has for what a contender runs."""
    return f"hybrid ulysses_size={default_size(size, problem.G)}" if method == "hybrid" else method


def verdict(
    times: dict[Contender, list[float]],
    expectation: tuple[dict[str, float], str],
    size: int,
    problem: Problem,
) -> tuple[str, bool]:
    """A line, and whether auto kept to the limit. times: seconds of each step of auto and of the others."""
    least = {c.method: min(t) for c, t in times.items()}
    others = {method: s for method, s in least.items() if method != "auto"}
    best = min(others, key=lambda method: others[method])
    spread = max(_spread(t) for c, t in times.items() if c.method in ("auto", best))
    seconds, chosen = expectation
    # Steps of auto and of the method that it took are the same steps, timed twice.
    twins = [s for method, s in others.items() if named(method, size, problem) == chosen]
    spread = max([spread, *(abs(least["auto"] / s - 1) for s in twins)])
    ratio = least["auto"] / others[best]
    compared = ", ".join(
        f"{method} {seconds[named(method, size, problem)] * 1e3:.1f} ({s * 1e3:.1f})"
        for method, s in others.items()
    )
    line = (
        f"{size} ranks, {problem}: auto took {chosen}; auto / best ({best}) {ratio:.2f}, spread {spread:.0%}; "
        f"ms expected (measured): {compared}"
    )
    return line, ratio <= LIMIT * (1 + spread)


def _spread(seconds: list[float]) -> float:
    """How sure the least time is: by how much the next one is longer."""
    first, *rest = sorted(seconds)
    return rest[0] / first - 1 if rest else 0.0
