"""moe_permute and moe_combine against torch's argsort, index_select and index_add, after a check of results.

    python bench/moe_permute.py [--threads 2] [--rounds 15]

Bound: the bytes that must move at least, at the rate of a copy: x and rows for moe_permute, both ways; rows and out for
moe_combine, and backward dout, rows and the rows' gradient. Results stay below 32 MiB: glibc maps larger ones anew, and
what is timed then are page faults.
"""

from pypar.selftest.cases.moe_permute import case, combine_case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for tokens, size, num_experts, k in ((1024, 1024, 64, 4), (2048, 512, 8, 2), (256, 2048, 128, 8)):
        token, rows = tokens * size, tokens * size * k
        sizes = (tokens, size, num_experts, k)
        compare(case(*sizes), (token + rows, token + rows), arguments.rounds, limit)
        compare(combine_case(*sizes), (token + rows, token + 2 * rows), arguments.rounds, limit)


if __name__ == "__main__":
    main()
