"""rope against the usual PyTorch form (x * cos + rotate_half(x) * sin), after a check of the results.

    python bench/rope.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: x and out forward; dout and dx backward.
"""

import math

from pypar.selftest.cases.rope import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for shape in ((1, 1024, 8, 64), (1, 4096, 32, 128)):
        compare(case(shape), (2 * math.prod(shape), 2 * math.prod(shape)), arguments.rounds, limit)


if __name__ == "__main__":
    main()
