"""attention against torch's scaled_dot_product_attention in the same run, after a check of results and gradients.

    python bench/attention.py [--threads 1 2] [--dtypes fp32 bf16 fp16] [--only decode window] [--quick]

Both sides take turns on the same threads, each bound to a core; the median counts; one call slower than the budget
is measured once. GFLOP/s count the products of the pairs of query and key that see each other and no others: two
forward, five more backward; "both" is forward and backward. "share" is of the larger rate at which this torch
multiplies 2048^3 matrices in the same dtype on as many threads, by MKL or oneDNN; for decoding, of the bytes that a
copy reads and writes in that time.

torch's side: its own causal flag where it has one; for a window a boolean mask; for sequences of several lengths
the sequences padded to the longest and a boolean mask. Padding and masks are made beforehand and cost it nothing.
Decoding takes keys and values in turn from more memory than the caches hold, as the layers of a model do.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from pypar.bench import timing
from pypar.bench.timing import DTYPES
from pypar.ops import native
from pypar.selftest import judge
from pypar.selftest.case import Case, Draw
from pypar.selftest.cases.attention import dense, lengths_causal
from pypar.selftest.rows import contenders

CACHES_BYTES = 128 << 20
LENGTHS = [100, 250, 400, 700, 1000, 1300, 1700, 2000]


@dataclass(frozen=True)
class Group:
    """Cases with one target. check: the case that is compared with fp64, shorter where that would take long."""

    name: str
    cases: list[tuple[Case, Case]]  # (timed, checked)
    targets: dict[tuple[str, str], float]  # (dtype, direction) -> ratio to torch
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    bandwidth_target: float = 0.0  # share of a copy's


def square(B: int, S: int, N: int, H: int, **options: object) -> tuple[Case, Case]:
    make = partial(
        dense, options.pop("name", "causal" if options.get("causal") else "full"), N=N, H=H, **options
    )
    return make(T=S, S=S, B=B), make(T=min(S, 1024), S=min(S, 1024), B=B)


def groups(quick: bool) -> list[Group]:
    long = [] if quick else [(1, 4096, 8, 64), (1, 4096, 4, 128)]
    shapes = [(1, 1024, 8, 64), *long]
    main = {
        **{(dtype, direction): 2.0 for dtype in DTYPES for direction in ("forward", "both")},
        ("bf16", "forward"): 3.0,
        ("fp16", "both"): 5.0,
        ("fp16", "forward"): 1.0,
    }
    twice = {(dtype, direction): 2.0 for dtype in DTYPES for direction in ("forward", "both")}
    once = dict.fromkeys(twice, 1.0)
    lengths = [length // 4 for length in LENGTHS] if quick else LENGTHS
    window, keys = (2048, 2048) if quick else (8192, 8192)
    decode = dense("one query", 1, keys, N=8, G=8, H=128, backward=False)
    return [
        Group("causal", [square(*s, G=s[2], causal=True) for s in shapes], main),
        Group("full", [square(*s, G=s[2]) for s in shapes], main),
        Group("grouped heads", [square(1, 1024, 8, 64, G=2, causal=True)], once),
        Group("short", [square(4, 512, 8, 64, G=8, causal=True)], twice),
        Group(
            "lengths",
            [
                (
                    lengths_causal("8 lengths, causal", lengths, N=4, G=4),
                    lengths_causal("8 lengths, causal", [length // 3 for length in lengths], N=4, G=4),
                )
            ],
            twice,
        ),
        Group(
            "window", [square(1, window, 2, 64, G=2, causal=True, window=(255, 0), name="window 256")], twice
        ),
        Group("decode", [(decode, decode)], once, ("fp32", "bf16"), 0.7),
    ]


@dataclass(frozen=True)
class Setting:
    """What holds for a block of the table."""

    threads: int
    dtype: str
    matmul: float
    copy: float
    budget_s: float


@dataclass(frozen=True)
class Outcome:
    """One row, for the summary."""

    title: str
    ratio: float
    target: float
    bandwidth: float = math.inf
    bandwidth_target: float = 0.0

    @property
    def missed(self) -> bool:
        return self.ratio < self.target or self.bandwidth < self.bandwidth_target


def input_bytes(case: Case, dtype: torch.dtype) -> int:
    return sum(x.nbytes for x in case.inputs(Draw("cpu", dtype, 1)).values())


def calls(case: Case, dtype: torch.dtype) -> list[dict[str, Callable[[], object]]]:
    """Contenders for forward, and for forward and backward."""
    inputs = case.inputs(Draw("cpu", dtype, 1))
    ours = contenders(case, partial(case.ours, backend="native"), inputs)
    peer = contenders(case, case.peer.call, case.peer.prepare(inputs))
    return [{"ours": a, "torch": b} for a, b in zip(ours, peer, strict=True)]


def decode_calls(case: Case, dtype: torch.dtype) -> list[dict[str, Callable[[], object]]]:
    """As `calls`, every call with the next of several sets of keys and values."""
    sets = [calls(case, dtype)[0] for _ in range(max(1, 2 * CACHES_BYTES // input_bytes(case, dtype)))]
    turns = {name: itertools.cycle([one[name] for one in sets]) for name in ("ours", "torch")}
    return [{name: (lambda turn=turn: next(turn)()) for name, turn in turns.items()}]


def failure(case: Case, dtype: torch.dtype) -> str | None:
    """Why this case is not timed: not supported, or wrong."""
    try:
        expected = judge.expect_case(case, "cpu", dtype)
        ours = partial(case.ours, backend="native")
        found = [judge.results(ours, draw.inputs, draw.douts) for draw in expected]
    except ValueError as error:
        return f"not supported: {error}"
    wrong = judge.judge_draws(found, expected).failure
    return f"WRONG: {wrong}" if wrong else None


def rows(group: Group, case: Case, setting: Setting) -> Iterator[tuple[str, Outcome]]:
    """Lines and what they say."""
    dtype = DTYPES[setting.dtype]
    decodes = group.bandwidth_target > 0
    for direction, turn in zip(
        ("forward", "both"), (decode_calls if decodes else calls)(case, dtype), strict=False
    ):
        seconds = timing.median_seconds(turn, budget_s=setting.budget_s)
        ours, peer = seconds["ours"], seconds["torch"]
        if decodes:
            work, limit, unit = input_bytes(case, dtype), setting.copy, "GB/s"
        else:
            work = case.flops[0] if direction == "forward" else sum(case.flops)
            limit, unit = setting.matmul, "GFLOP/s"
        target = group.targets[setting.dtype, direction]
        outcome = Outcome(
            f"{group.name}, {case.shape}, {setting.dtype}, {direction}, {setting.threads} threads",
            peer / ours,
            target,
            work / ours / limit if decodes else math.inf,
            group.bandwidth_target,
        )
        mark = " <" if outcome.missed else ""
        yield (
            f"  {case.shape:30} {direction:7} {ours * 1e3:9.3f} ms {work / ours / 1e9:6.0f} {unit} "
            f"share {work / ours / limit:4.2f} | torch {peer * 1e3:9.3f} ms {work / peer / 1e9:6.0f} {unit} "
            f"| ratio {peer / ours:5.2f}{mark}",
            outcome,
        )


def title(group: Group, dtype: str) -> str:
    wanted = f"forward >= {group.targets[dtype, 'forward']}x"
    if group.bandwidth_target:
        wanted += f" torch and >= {group.bandwidth_target:.0%} of a copy's bytes"
    else:
        wanted += f", forward+backward >= {group.targets[dtype, 'both']}x torch"
    return f" {group.name} ({group.cases[0][0].peer.name}); target: {wanted}"


def summary(outcomes: list[Outcome]) -> Iterator[str]:
    missed = [outcome for outcome in outcomes if outcome.missed]
    yield f"\n{len(outcomes) - len(missed)} of {len(outcomes)} rows reach their target; missed:"
    for o in missed:
        share = (
            f", {o.bandwidth:.0%} of a copy (target {o.bandwidth_target:.0%})" if o.bandwidth_target else ""
        )
        yield f"  {o.title}: {o.ratio:.2f}x (target {o.target}x){share}"
    if outcomes:
        worst = min(outcomes, key=lambda o: o.ratio)
        yield f"worst ratio: {worst.ratio:.2f}x, {worst.title}"


def parse_arguments() -> argparse.Namespace:
    names = [group.name for group in groups(True)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default 1 2, with --quick 1")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None, help="with --quick fp32 bf16")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="groups of the table")
    parser.add_argument("--quick", action="store_true", help="short lengths, under a minute")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    arguments.dtypes = arguments.dtypes or [*DTYPES][: 2 if arguments.quick else 3]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    timing.bind_threads()
    budget_s = 0.15 if arguments.quick else 0.7
    print(f"instruction set {native.module().selected_isa()}, torch {torch.__version__}")
    outcomes: list[Outcome] = []
    checked: dict[tuple[str, str, str], str | None] = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        copy = timing.copy_rate(budget_s=budget_s)
        for name in arguments.dtypes:
            setting = Setting(
                threads, name, timing.matmul_rate(DTYPES[name], budget_s=budget_s), copy, budget_s
            )
            print(
                f"\n{threads} threads, {name}: 2048^3 matmul {setting.matmul / 1e9:.0f} GFLOP/s, "
                f"copy {copy / 1e9:.1f} GB/s"
            )
            for group in groups(arguments.quick):
                if group.name not in arguments.only or name not in group.dtypes:
                    continue
                print(title(group, name))
                for timed, short in group.cases:
                    key = (group.name, timed.shape, name)
                    if key not in checked:
                        checked[key] = failure(short, DTYPES[name])
                    if checked[key]:
                        print(f"  {timed.shape:30} {checked[key]}", flush=True)
                        continue
                    for line, outcome in rows(group, timed, setting):
                        print(line, flush=True)
                        outcomes.append(outcome)
    for line in summary(outcomes):
        print(line)
    if any(text and text.startswith("WRONG") for text in checked.values()):
        raise SystemExit("a result is wrong, see above")


if __name__ == "__main__":
    main()
