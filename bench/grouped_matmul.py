"""grouped_matmul against a loop of torch's matmuls, forward and both gradients, after a check of results.

    python bench/grouped_matmul.py [--threads 2] [--rounds 7]

Large groups are limited by the rate of a large matmul of the same run, few rows by reading (or, for the weights'
gradient, writing) every matrix once at the rate of a copy: the share is that of the slower limit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pypar.bench import timing
from pypar.ops.grouped_matmul import BACKENDS
from pypar.selftest.case import Draw
from pypar.selftest.cases.grouped_matmul import case
from pypar.selftest.compare import DTYPES, parse_arguments, print_limit
from pypar.selftest.judge import check_case

K, N = 512, 1408
COUNTS = {
    "8 of 128 rows": (128,) * 8,
    "64 of 1-16 rows": tuple(1 + 7 * e % 16 for e in range(64)),
    "64 of 0-64 rows": tuple(7 * e % 65 for e in range(64)),
}


def loops(x: Tensor, weight: Tensor, dout: Tensor, counts: list[int]) -> dict[str, Callable[[], object]]:
    """Forward and both gradients as a loop has them, results in one tensor each."""

    def forward() -> Tensor:
        groups = x.split(counts)
        return torch.cat([group @ w.t() for group, w in zip(groups, weight, strict=True)])

    def dx() -> Tensor:
        return torch.cat([group @ w for group, w in zip(dout.split(counts), weight, strict=True)])

    def dweight() -> Tensor:
        groups = zip(dout.split(counts), x.split(counts), strict=True)
        return torch.stack([d.t() @ group for d, group in groups])

    return {"forward": forward, "dx": dx, "dweight": dweight}


def main() -> None:
    arguments = parse_arguments(__doc__)
    copy_rate = print_limit(arguments)
    ours = BACKENDS[0]
    for name in DTYPES:
        dtype = timing.DTYPES[name]
        matmul_rate = timing.matmul_rate(dtype, rounds=3)
        print(f"{name}: a large matmul runs at {matmul_rate / 1e9:.0f} GFLOP/s")
        check_case(case((3, 0, 16, 1, 40), 200, 111), dtype, None)
        for shape, counts in COUNTS.items():
            given = case(counts, K, N).inputs(Draw("cpu", dtype, seed=1))
            x, weight, groups = given["x"], given["weight"], given["counts"]
            dout = torch.randn(len(x), N).to(dtype)
            pieces = {
                "forward": lambda g=(x, weight, groups): ours.forward(*g),
                "dx": lambda g=(dout, weight, groups): ours.input_gradient(*g),
                "dweight": lambda g=(dout, x, weight, groups): ours.weight_gradient(*g),
            }
            flops = 2.0 * len(x) * K * N
            least = max(flops / matmul_rate, weight.nbytes / copy_rate)
            cells = []
            for piece, loop in loops(x, weight, dout, list(counts)).items():
                contenders = {"ours": pieces[piece], "loop": loop}
                seconds = timing.best_seconds(contenders, min(arguments.rounds, 7))
                mine = seconds["ours"]
                cells.append(
                    f"{piece} {mine * 1e6:8.0f} us, {seconds['loop'] / mine:5.2f}x the loop's speed, "
                    f"{flops / mine / 1e9:4.0f} GFLOP/s, {least / mine:4.0%} of the limit"
                )
            print(f"{shape}, {K} to {N}, {name}: {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
