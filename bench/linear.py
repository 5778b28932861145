"""linear in fp32: MKL against oneDNN, both inside this torch, forward and both gradients, after a check.

    python bench/linear.py [--threads 2] [--rounds 15]

"gain" is what the choice of library brings: the time of torch's own choice (MKL) over that of the library
which pypar takes on this processor. The machine's limit is the larger rate of the two at 2048^3.
"""

import torch
from torch import Tensor

from pypar.bench.timing import best_seconds
from pypar.ops.linear import (
    library_choice,
    linear_forward,
    linear_input_gradient,
    linear_weight_gradient,
    processor,
)
from pypar.selftest.case import Draw
from pypar.selftest.cases.linear import case
from pypar.selftest.compare import parse_arguments
from pypar.selftest.judge import check_case

SIZES = ((1024, 512, 512), (1024, 512, 1408), (1024, 1408, 512), (8192, 512, 512), (2048, 2048, 2048))
NAMES = ("torch", "onednn")


def pieces(x: Tensor, weight: Tensor, dout: Tensor) -> dict:
    return {
        "forward": lambda name: linear_forward(x, weight, backend=name),
        "dx": lambda name: linear_input_gradient(dout, weight, backend=name),
        "dweight": lambda name: linear_weight_gradient(dout, x, backend=name),
    }


def main() -> None:
    arguments = parse_arguments(__doc__)
    chosen, reason = library_choice(processor())
    print(f"{arguments.threads} threads; fp32 linear takes {chosen}: {reason}")
    for rows, inputs, outputs in SIZES:
        given = case((rows,), inputs, outputs, bias=False)
        x, weight = given.inputs(Draw("cpu", torch.float32, seed=1)).values()
        dout = torch.randn(rows, outputs)
        for name in NAMES:
            check_case(given, torch.float32, name)
        gflop = 2 * rows * inputs * outputs / 1e9
        totals = dict.fromkeys(NAMES, 0.0)
        cells = []
        wide = pieces(*(t.double() for t in (x, weight, dout)))
        for piece, run in pieces(x, weight, dout).items():
            exact = wide[piece]("torch")
            errors = {name: (run(name) - exact).abs().max().item() for name in NAMES}
            contenders = {name: (lambda run=run, name=name: run(name)) for name in NAMES}
            seconds = best_seconds(contenders, arguments.rounds)
            for name in NAMES:
                totals[name] += seconds[name]
            rates = ", ".join(f"{name} {gflop / seconds[name]:4.0f} GFLOP/s" for name in NAMES)
            cells.append(f"{piece}: {rates}, error {errors['onednn'] / errors['torch']:.1f}x")
        cells.append(f"gain {totals['torch'] / totals[chosen]:.2f}x")
        print(f"x [{rows}, {inputs}] -> {outputs}: {' | '.join(cells)}")


if __name__ == "__main__":
    main()
