"""How well the ring hides its communication: two ranks on two hosts, joined by a cable of a chosen speed.

The cable is set so that a step's communication alone takes 0.5, 0.9 and 1.2 of the step with communication left out.
A step that hides all it can takes the larger of the two, both measured here.
"""

from __future__ import annotations

import argparse
import statistics

from pypar.bench import namespaces
from pypar.bench.context_parallel.step import (
    Contender,
    Problem,
    check,
    sampled_single,
    sampled_step,
    timed_step,
)
from pypar.bench.context_parallel.workers import Workers, host_of
from pypar.bench.timing import DTYPES
from pypar.mesh import Axis

SHARES = {0.5: 1.05, 0.9: 1.1, 1.2: 1.25}  # communication / compute -> step / max of both, at most
SIZE = 2


def set_speed(axis: Axis, bits_per_second: int) -> None:
    namespaces.shape(host_of(axis.rank, axis.size), bits_per_second)


def main(arguments: argparse.Namespace) -> str | None:
    if reason := namespaces.why_not():
        return f"--network was asked for, but {reason}"
    print(
        "| tokens | dtype | layout | cable, Mbit/s | compute, ms | communication, ms | ratio | step, ms ",
        end="",
    )
    print("| of max | asked |\n|" + "---|" * 10)
    with Workers(SIZE, arguments.backend, 10**10) as workers:
        for dtype in arguments.dtypes:
            for length in arguments.lengths:
                problem = Problem(length, DTYPES[dtype], not arguments.full)
                for layout in arguments.layouts or ["zigzag"]:
                    measure(workers, problem, layout, dtype, arguments.rounds)
    return None


def measure(workers: Workers, problem: Problem, layout: str, dtype: str, rounds: int) -> None:
    ring = Contender("ring", layout)
    check(workers.ranks(sampled_step, problem, ring), workers.single(sampled_single, problem), problem.dtype)
    silent, idle = ring._replace(communicates=False), ring._replace(communicates=True)

    def seconds(contenders: list[Contender]) -> list[float]:
        """The median of each contender's times."""
        times: list[list[float]] = [[] for _ in contenders]
        for _ in range(rounds):
            for contender, record in zip(contenders, times, strict=True):
                ranks = workers.ranks(timed_step, problem, contender)
                record.append(max(t.ended for t in ranks) - min(t.began for t in ranks))
        return [statistics.median(record) for record in times]

    [compute] = seconds([silent])
    sent = max(t.sent for t in workers.ranks(timed_step, problem, ring))
    for share, asked in SHARES.items():
        # 5 % of what the cable carries is headers.
        speed = int(8 * sent / (share * compute) * 1.05)
        workers.ranks(set_speed, speed)
        step, compute_now, communication = seconds([ring, silent, idle])
        print(
            f"| {problem.length} | {dtype} | {layout} | {speed / 1e6:.0f} | {compute_now * 1e3:.0f} "
            f"| {communication * 1e3:.0f} | {communication / compute_now:.2f} | {step * 1e3:.0f} "
            f"| {step / max(compute_now, communication):.2f} | {asked} |",
            flush=True,
        )
