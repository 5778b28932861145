"""Scaling and converting a bucket in one pass, against torch's passes for the same.

    python bench/bucket.py [--threads 2] [--rounds 15]

"one call" is torch.mul(src, scale, out=...), "two passes" are out.copy_(src).mul_(scale). The results are compared
bit by bit, also with the definition, before anything is timed. GB/s counts what must move at least: src is read, out
is written.
"""

import itertools

import torch

from pypar.bench import timing
from pypar.ops.bucket import bucket
from pypar.selftest.case import Draw
from pypar.selftest.cases.bucket import case, plain
from pypar.selftest.compare import DTYPES, parse_arguments, print_limit

SCALE = 0.5  # exact, so that rounding once and rounding twice agree


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for count in (1 << 14, 1 << 18, 25 << 18):
        for source, target in itertools.product(DTYPES, DTYPES):
            if (source, target) != ("bf16", "bf16"):
                line = measure(count, timing.DTYPES[source], timing.DTYPES[target], arguments.rounds)
                print(f"{count:8} elements, {source} to {target}: {line}")


def measure(count: int, source: torch.dtype, target: torch.dtype, rounds: int) -> str:
    src = case(count, target, SCALE).inputs(Draw("cpu", source, seed=1))["src"]
    outs = [torch.empty(count, dtype=target) for _ in range(3)]
    contenders = {
        "ours": lambda: bucket(src, SCALE, out=outs[0]),
        "one call": lambda: torch.mul(src, SCALE, out=outs[1]),
        "two passes": lambda: outs[2].copy_(src).mul_(SCALE),
    }
    for run in contenders.values():
        run()
    expected = plain(src, SCALE, target)
    assert all(torch.equal(out, expected) for out in outs), "the results differ"
    seconds = timing.best_seconds(contenders, rounds)
    ours = seconds["ours"]
    rate = (src.nbytes + outs[0].nbytes) / ours / 1e9
    ratios = ", ".join(f"{name} {seconds[name] / ours:5.2f}x" for name in ("one call", "two passes"))
    return f"{ours * 1e6:8.1f} us, {rate:5.1f} GB/s; torch: {ratios}"


if __name__ == "__main__":
    main()
