"""linear: torch's own choice of a library against the one that pypar takes, forward and both gradients, after a check.

    python bench/linear.py [--threads 2] [--rounds 15]

In fp32 the two are MKL and oneDNN, both inside this torch; in bf16 and fp16 torch's own product and one of fp32 copies.
"gain" is what the choice brings: the time of torch's own over that of the library which pypar takes on this processor.
The machine's limit is the larger fp32 rate of all at 2048^3.
"""

import torch
from torch import Tensor

from pypar.bench.timing import best_seconds
from pypar.ops.linear import linear_forward, linear_input_gradient, linear_weight_gradient
from pypar.ops.linear.choice import half_choice, library_choice, processor
from pypar.selftest.case import Draw
from pypar.selftest.cases.linear import case
from pypar.selftest.compare import parse_arguments
from pypar.selftest.judge import check_case

SIZES = ((1024, 512, 512), (1024, 512, 1408), (1024, 1408, 512), (8192, 512, 512), (2048, 2048, 2048))
RIVALS = {torch.float32: "onednn", torch.bfloat16: "upcast", torch.float16: "upcast"}


def pieces(x: Tensor, weight: Tensor, dout: Tensor) -> dict:
    return {
        "forward": lambda name: linear_forward(x, weight, backend=name),
        "dx": lambda name: linear_input_gradient(dout, weight, backend=name),
        "dweight": lambda name: linear_weight_gradient(dout, x, backend=name),
    }


def race(sizes: tuple[int, int, int], dtype: torch.dtype, chosen: str, rounds: int) -> str:
    """A line of rates, errors and what the choice gains."""
    rows, inputs, outputs = sizes
    names = ("torch", RIVALS[dtype])
    given = case((rows,), inputs, outputs, bias=False)
    x, weight = given.inputs(Draw("cpu", dtype, seed=1)).values()
    dout = torch.randn(rows, outputs).to(dtype)
    for name in names:
        check_case(given, dtype, name)
    gflop = 2 * rows * inputs * outputs / 1e9
    totals = dict.fromkeys(names, 0.0)
    cells = []
    wide = pieces(*(t.double() for t in (x, weight, dout)))
    for piece, run in pieces(x, weight, dout).items():
        exact = wide[piece]("torch")
        errors = {name: (run(name) - exact).abs().max().item() for name in names}
        contenders = {name: (lambda run=run, name=name: run(name)) for name in names}
        seconds = best_seconds(contenders, rounds)
        for name in names:
            totals[name] += seconds[name]
        rates = ", ".join(f"{name} {gflop / seconds[name]:4.0f} GFLOP/s" for name in names)
        cells.append(f"{piece}: {rates}, error {errors[names[1]] / errors['torch']:.1f}x")
    cells.append(f"gain {totals['torch'] / totals[chosen]:.2f}x")
    return f"x [{rows}, {inputs}] -> {outputs}: {' | '.join(cells)}"


def main() -> None:
    arguments = parse_arguments(__doc__)
    for dtype in RIVALS:
        is_fp32 = dtype == torch.float32
        chosen, reason = library_choice(processor()) if is_fp32 else half_choice(dtype)
        print(f"{arguments.threads} threads; linear in {dtype} takes {chosen}: {reason}")
        for sizes in SIZES:
            # torch's loops in 16 bits take seconds each.
            print(race(sizes, dtype, chosen, arguments.rounds if is_fp32 else min(3, arguments.rounds)))


if __name__ == "__main__":
    main()
