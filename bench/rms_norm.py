"""rms_norm against torch.nn.functional.rms_norm, after a check of results and gradients.

    python bench/rms_norm.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: x and out forward; dout, x and dx backward.
"""

from pypar.selftest.cases.rms_norm import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for rows, size in ((1024, 512), (1024, 4096), (8192, 2048)):
        compare(case((rows, size)), (2 * rows * size, 3 * rows * size), arguments.rounds)


if __name__ == "__main__":
    main()
