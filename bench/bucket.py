"""Scaling and converting a bucket in one pass, against torch's passes for the same.

    python bench/bucket.py [--threads 2] [--rounds 15]

"one call" is torch.mul(src, scale, out=...), "two passes" are out.copy_(src).mul_(scale). The results are compared
bit by bit before anything is timed. GB/s counts what must move at least: src is read, out is written.
"""

import torch
from timing import DTYPES, best_seconds, parse_arguments, print_limit

from pypar.ops.bucket import bucket

SCALE = 0.5  # exact, so that rounding once and rounding twice agree


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for count in (1 << 14, 1 << 18, 25 << 18):
        for source_name, source in DTYPES.items():
            for target_name, target in DTYPES.items():
                if (source, target) != (torch.bfloat16, torch.bfloat16):
                    line = measure(count, source, target, arguments.rounds)
                    print(f"{count:8} elements, {source_name} to {target_name}: {line}")


def measure(count: int, source: torch.dtype, target: torch.dtype, rounds: int) -> str:
    src = torch.randn(count).to(source)
    outs = [torch.empty(count, dtype=target) for _ in range(3)]
    contenders = {
        "ours": lambda: bucket(src, SCALE, out=outs[0]),
        "one call": lambda: torch.mul(src, SCALE, out=outs[1]),
        "two passes": lambda: outs[2].copy_(src).mul_(SCALE),
    }
    for run in contenders.values():
        run()
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]), "the results differ"
    seconds = best_seconds(contenders, rounds)
    ours = seconds["ours"]
    rate = (src.nbytes + outs[0].nbytes) / ours / 1e9
    ratios = ", ".join(f"{name} {seconds[name] / ours:5.2f}x" for name in ("one call", "two passes"))
    return f"{ours * 1e6:8.1f} us, {rate:5.1f} GB/s; torch: {ratios}"


if __name__ == "__main__":
    main()
