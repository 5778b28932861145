"""merge_attention against logsumexp, exp and a weighted sum in torch, after a check of results and gradients.

    python bench/merge_attention.py [--threads 2] [--rounds 15]

Bound: the bytes that must move at least: outs and out forward; dout, outs and their gradients backward.
"""

from pypar.selftest.cases.merge_attention import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for parts, heads, size in ((2, 16, 128), (4, 16, 64), (8, 16, 128)):
        rows = 1024 * heads * size
        traffic = ((parts + 1) * rows, (2 * parts + 1) * rows)
        compare(case(parts, (1, 1024, heads, size)), traffic, arguments.rounds, limit)


if __name__ == "__main__":
    main()
