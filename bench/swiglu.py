"""swiglu against torch's silu(gate) * up, after a check of results and gradients.

    python bench/swiglu.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: gate, up and out forward; dout, gate, up and two gradients backward.
"""

from pypar.selftest.cases.swiglu import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for rows, size in ((1024, 1408), (1024, 11008)):
        compare(case((rows, size)), (3 * rows * size, 5 * rows * size), arguments.rounds, limit)


if __name__ == "__main__":
    main()
