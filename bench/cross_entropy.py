"""cross_entropy against torch.nn.functional.cross_entropy, after a check of results and gradients.

    python bench/cross_entropy.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: the logits forward; the logits and their gradient backward.
"""

from pypar.selftest.cases.cross_entropy import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for rows, size in ((1024, 512), (1024, 32000)):
        compare(case((rows, size)), (rows * size, 2 * rows * size), arguments.rounds, limit)


if __name__ == "__main__":
    main()
