"""rms_norm against torch.nn.functional.rms_norm in eager mode, after a check of results and gradients.

    python bench/rms_norm.py [--threads 2] [--rounds 15]

Bound: the bytes that must move at least, at the rate of a copy: x and out forward, dout, x and dx backward; with a
residual x, residual, sum and out forward, dout, the sum's gradient, the sum and dx backward.
"""

from pypar.selftest.cases.rms_norm import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for rows, size in ((4096, 1024), (1024, 4096), (65536, 128), (65536, 64)):
        for residual in (False, True) if size >= 1024 else (False,):
            traffic = (4, 4) if residual else (2, 3)
            elements = rows * size
            compare(
                case((rows, size), residual=residual),
                (traffic[0] * elements, traffic[1] * elements),
                arguments.rounds,
                limit,
            )


if __name__ == "__main__":
    main()
