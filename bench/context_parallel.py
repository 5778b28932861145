"""Step time of attention over a sharded sequence, by degree, length, method and layout, beside one process.

    python bench/context_parallel.py [--ranks 2 4] [--lengths 8192 16384] [--dtypes bf16 fp32]
        [--methods ring ...] [--layouts zigzag ...] [--rounds 5] [--full] [--window 255] [--backend pypar]
    python bench/context_parallel.py --auto                auto beside the others alone, zigzag: a short run
    python bench/context_parallel.py --timeline FILE.png   compute and communication of each rank, drawn
    python bench/context_parallel.py --network             over a cable between two network namespaces, as root
    python bench/context_parallel.py --long                131,072 tokens on 4 ranks

One step is forward and backward of attention: B 1, N 8, G 2, H 64, causal unless --full. Each rank has one thread,
bound to a core.
Contenders take turns in one run; a step is timed from its common start to the end of the slowest rank, and the least
time of all rounds counts. First each contender's output and gradients are compared with the single process's.

    single     pypar.attention of the whole sequence in one process with as many threads as the ranks: what a method
               without any cost of its own would take
    of ideal   single / step
    torch      torch's scaled_dot_product_attention there / step
    silent     the step of the method with communication left out
    exposed    1 - silent / step: the share of a step that communication costs
    waiting    share of a step in which the rank that waits longest is blocked

Where auto is among the methods, a closing line for each problem tells what it took, what it expected of each method,
and auto / best: the least time of auto's steps / that of the best of the others. The program fails where that is above
1.1 by more than the spread of the run: how much longer than the least time the next one was, of auto or of the best,
or how much auto differs from the method that it took, whose steps are the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from pypar.bench.context_parallel import auto, long, network, timeline
from pypar.bench.context_parallel.step import (
    Contender,
    Problem,
    Timed,
    check,
    sampled_single,
    sampled_step,
    timed_single,
    timed_step,
)
from pypar.bench.context_parallel.workers import Workers
from pypar.bench.timing import DTYPES
from pypar.context_parallel.layouts import LAYOUTS
from pypar.context_parallel.methods.registry import methods

ASKED = {(2, 8192): 0.9, (2, 16384): 0.9}  # of ideal, by ranks and length, of a zigzag ring


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--methods", nargs="+", choices=sorted(methods()), default=sorted(methods()))
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), help="of the ring; others zigzag")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="no causal mask")
    parser.add_argument("--window", type=int, help="so many keys before its own are seen by a query")
    parser.add_argument("--backend", default="pypar", help="of torch.distributed")
    parser.add_argument("--timeline", metavar="FILE")
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--auto", action="store_true")
    return parser.parse_args()


def contenders_of(arguments: argparse.Namespace, size: int) -> list[Contender]:
    found = []
    for method in arguments.methods:
        if method == "hybrid" and size < 4:
            continue  # one of the others
        layouts = arguments.layouts or sorted(LAYOUTS, reverse=True)
        found += [Contender(method, x) for x in (layouts if method == "ring" else layouts[:1])]
    return found


def measure(
    workers: Workers, problem: Problem, contenders: list[Contender], rounds: int
) -> dict[Any, list[Timed]]:
    """The slowest rank's times of each contender, with and without communication, and of "single" and "torch"."""
    expected = workers.single(sampled_single, problem)
    for contender in contenders:
        check(workers.ranks(sampled_step, problem, contender), expected, problem.dtype)
    silent = [contender._replace(communicates=False) for contender in contenders]
    times: dict[Any, list[Timed]] = {name: [] for name in (*contenders, *silent, "single", "torch")}
    first = slowest(workers.ranks(timed_step, problem, contenders[0]))
    turn = max(1, int(auto.TURN_S / (first.ended - first.began)))  # steps of it
    for _ in range(rounds):
        for contender in (*contenders, *silent):
            times[contender] += [slowest(workers.ranks(timed_step, problem, contender)) for _ in range(turn)]
        times["single"].append(workers.single(timed_single, problem, False))
        times["torch"].append(workers.single(timed_single, problem, True))
    return times


def slowest(of_ranks: list[Timed]) -> Timed:
    return Timed(
        min(t.began for t in of_ranks),
        max(t.ended for t in of_ranks),
        max(t.waited for t in of_ranks),
        max(t.sent for t in of_ranks),
    )


def seconds(times: list[Timed]) -> float:
    return min(durations(times))


def durations(times: list[Timed]) -> list[float]:
    return [t.ended - t.began for t in times]


def report(size: int, problem: Problem, times: dict[Any, list[Timed]]) -> None:
    single, torch_s = seconds(times["single"]), seconds(times["torch"])
    dtype = next(name for name, dtype in DTYPES.items() if dtype == problem.dtype)
    for contender in [c for c in times if isinstance(c, Contender) and c.communicates is None]:
        step = seconds(times[contender])
        silent = seconds(times[contender._replace(communicates=False)])
        waited = statistics.median(t.waited for t in times[contender]) / step
        asked = ASKED.get((size, problem.length)) if contender == Contender("ring") else None
        print(
            f"| {size} | {problem.length} | {dtype} | {contender.method} | {contender.layout} | {step * 1e3:.0f} "
            f"| {single * 1e3:.0f} | {single / step:.0%}{f' (asked {asked:.0%})' if asked else ''} "
            f"| {torch_s / step:.2f}x | {silent * 1e3:.0f} | {1 - silent / step:.1%} | {waited:.1%} "
            f"| {times[contender][0].sent / 1e6:.1f} |",
            flush=True,
        )


def main() -> None:
    arguments = parse_arguments()
    for asked, program in (
        (arguments.timeline, timeline),
        (arguments.network, network),
        (arguments.long, long),
        (arguments.auto, auto),
    ):
        if asked:
            sys.exit(program.main(arguments))
    print(
        "| ranks | tokens | dtype | method | layout | step, ms | single, ms | of ideal | torch | silent, ms ",
        end="",
    )
    print("| exposed | waiting | sent, MB |\n|" + "---|" * 13)
    problems = [
        Problem(length, DTYPES[dtype], not arguments.full, window=arguments.window)
        for dtype in arguments.dtypes
        for length in arguments.lengths
    ]
    verdicts = []
    for size in arguments.ranks:
        with Workers(size, arguments.backend) as workers:
            if "auto" in arguments.methods:
                for dtype in arguments.dtypes:
                    workers.ranks(auto.measured, DTYPES[dtype])
            for problem in problems:
                times = measure(workers, problem, contenders_of(arguments, size), arguments.rounds)
                report(size, problem, times)
                verdicts += judge_auto(workers, problem, times)
    print(*(line for line, _ in verdicts), sep="\n")
    sys.exit(auto.failure(sum(not kept for _, kept in verdicts)))


def judge_auto(workers: Workers, problem: Problem, times: dict[Any, list[Timed]]) -> list[tuple[str, bool]]:
    """A verdict on auto, where it and others ran."""
    ran = [c for c in times if isinstance(c, Contender) and c.communicates is None]
    mine = next((c for c in ran if c.method == "auto"), None)
    same = [c for c in ran if mine is not None and c.layout == mine.layout]
    if mine is None or len(same) < 2:
        return []
    expectation = workers.ranks(auto.expected, problem, mine.layout)[0]
    return [auto.verdict({c: durations(times[c]) for c in same}, expectation, workers.size, problem)]


if __name__ == "__main__":
    main()
