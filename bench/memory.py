"""Training with states cut over two ranks: pypar's ZeRO beside torch's FSDP2 and DeepSpeed's, speed and memory.

    python bench/memory.py [--precision fp32 bf16] [--steps 3] [--rounds 2] [--only NAME ...] [--json F] [--picture F]
    python bench/memory.py --ladder [--budget 1024] [--length 128] [--run 3] [--json F] [--picture F]

Contenders train the workload of bench/train.py, each rank on its share of the cores, and take turns; the figure is the
median over all timed steps of all rounds, and all must report the same losses. Who takes part is told in
pypar/bench/training/sharded.py; DeepSpeed's three where it is installed (pip install 'pypar-torch[peers]').

    x stage 0    the step of pypar's stage 0 by the contender's, in the same trainer or the same script
    x FSDP2      the step of torch's FSDP2 by the contender's
    tensors      the most that torch holds at once on the first rank in a step, by one step of each that is not timed
    states       the most of it by category, at the ends of layers (not at one time)
    process      the most memory that the whole process has held, its code and torch's own too

--picture draws what is held over the time of a step, by category. --ladder tells the largest decoder that trains
within a budget of MiB a rank, for each way to cut states, by formula; --run trains the one of a stage and compares.
"""

import argparse
import json
import os
from pathlib import Path

from pypar.bench import figures
from pypar.bench.figures import Figure
from pypar.bench.training import ladder, race, timeline
from pypar.bench.training.contenders import Workload
from pypar.bench.training.race import Result
from pypar.bench.training.sharded import RUNNING, STAGES, missing
from pypar.bench.training.timeline import Timeline
from pypar.doctor import machine_lines
from pypar.train.precision import PRECISIONS

PEER = "torch FSDP2"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=3, help="timed steps a launch")
    parser.add_argument("--rounds", type=int, default=2, help="launches of each contender")
    parser.add_argument("--sequences", type=int, default=8, help="of a step, one a microbatch")
    parser.add_argument(
        "--length", type=int, default=0, help="tokens of a sequence; default 1024, of --ladder 128"
    )
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw into a PNG, one for each precision"
    )
    parser.add_argument("--ladder", action="store_true", help="the largest decoder within a budget, by stage")
    parser.add_argument("--budget", type=int, default=1024, metavar="MIB", help="of --ladder, for each rank")
    parser.add_argument(
        "--run", type=int, choices=STAGES, help="of --ladder: train the largest of this stage"
    )
    options = parser.parse_args()
    if options.only and not any(word in name for word in options.only for name in RUNNING):
        parser.error(f"--only {' '.join(options.only)}: no such contender; there are {'; '.join(RUNNING)}")
    return options


def main() -> None:
    options = parse_arguments()
    machine = [*machine_lines(), f"load of the last minute {os.getloadavg()[0]:.1f}"]
    print("\n".join(machine))
    found: list[Figure] = []
    memory: list[dict[str, object]] = []
    for precision in options.precision:
        if options.ladder:
            memory += climb(Workload(precision, 2, options.length or 128), options)
            continue
        workload = Workload(precision, options.sequences, options.length or 1024)
        names = [name for name in RUNNING if not options.only or any(word in name for word in options.only)]
        absent = {name: reason for name in names if (reason := missing(name))}
        results = race.race(
            [name for name in names if name not in absent],
            workload,
            steps=options.steps,
            rounds=options.rounds,
        )
        ran = {name: result for name, result in results.items() if not result.failure}
        watched = {name: timeline.record_ranks(name, workload) for name in ran}
        report(ran, watched, workload)
        for name, reason in (absent | {n: r.failure for n, r in results.items() if r.failure}).items():
            print(f"{name} did not run: {reason}")
        found += race.figures(results, workload, "memory")
        memory += [
            {"what": name, "dtype": precision, "peak": each.peak, "process": ran[name].peak_bytes} | each.most
            for name, each in watched.items()
        ]
        if options.picture:
            timeline.draw(of_precision(options.picture, precision), f"{precision}; {machine[0]}", watched)
    if options.json:
        figures.write(options.json, machine, found)
        everything = json.loads(options.json.read_text()) | {"memory": memory}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


def of_precision(path: Path, precision: str) -> Path:
    return path.with_name(f"{path.stem}-{precision}{path.suffix}")


def own_stage_0(name: str) -> str:
    """The contender that does the same with nothing cut."""
    return "pypar.zero 0 of the plain model" if name.startswith("pypar.zero") else "pypar zero 0"


def report(ran: dict[str, Result], watched: dict[str, Timeline], workload: Workload) -> None:
    print(f"\n{workload.precision}: {workload.sequences} x {workload.length} tokens a step, {workload.sizes}")
    print("| contender | tokens/s | spread | x stage 0 | x FSDP2 | tensors MB | process MB | states MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in ran.items():
        step = result.median
        spread = (max(result.seconds) - min(result.seconds)) / step
        ratios = [
            f"{ran[other].median / step:.2f}" if other in ran else "-" for other in (own_stage_0(name), PEER)
        ]
        most = ", ".join(f"{what} {n / 1e6:.0f}" for what, n in watched[name].most.items() if n)
        print(
            f"| {name} | {workload.tokens / step:,.0f} | {spread:.0%} | {' | '.join(ratios)} "
            f"| {watched[name].peak / 1e6:,.0f} | {result.peak_bytes / 1e6:,.0f} | {most} |",
            flush=True,
        )


def climb(workload: Workload, options: argparse.Namespace) -> list[dict[str, object]]:
    """The table and the picture of the largest decoders, and one of them really trained."""
    workload.data()
    budget = options.budget << 20
    rungs = ladder.ladder(workload, budget, ladder.beside_states(workload))
    print(
        f"\n{workload.precision}: the largest decoder of width {workload.sizes.d_model} that trains on 2 ranks within "
        f"{options.budget} MiB each, {workload.length} tokens a rank, AdamW"
    )
    print("| states cut | layers | parameters | x none | predicted MB |")
    print("|---|---|---|---|---|")
    for rung in rungs:
        ratio = rung.num_parameters / rungs[0].num_parameters
        print(
            f"| {rung.name} | {rung.num_layers} | {rung.num_parameters / 1e6:.1f} M | {ratio:.2f} "
            f"| {rung.num_bytes / 1e6:,.0f} |"
        )
    if options.picture:
        title = f"the largest decoder within {options.budget} MiB a rank, {workload.precision}, 2 ranks"
        ladder.draw(of_precision(options.picture, workload.precision), title, rungs)
    for rung in rungs:
        if rung.stage == options.run:
            found = timeline.record_ranks(
                f"pypar zero {rung.stage}", ladder.with_layers(workload, rung.num_layers)
            )
            print(
                f"{rung.name}, {rung.num_layers} layers, really trained: at most {found.peak / 1e6:,.0f} MB at once, "
                f"{found.peak / rung.num_bytes:.0%} of what was predicted, {found.peak / budget:.0%} of the budget"
            )
    return [{"dtype": workload.precision} | vars(rung) for rung in rungs]


if __name__ == "__main__":
    main()
