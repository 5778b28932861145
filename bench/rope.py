"""rope against the usual PyTorch form (x * cos + rotate_half(x) * sin), after a check of results and gradients.

    python bench/rope.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: q and k, and what is made of them, in either direction.
"""

from pypar.selftest.cases.rope import case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    for (B, T, N, H), kv_heads, options in (
        ((1, 4096, 12, 64), 4, {}),
        ((1, 4096, 12, 64), 4, {"interleaved": True}),
        ((1, 4096, 12, 64), 4, {"rotary": 16}),
        ((1, 4096, 32, 128), 8, {}),
    ):
        elements = 2 * B * T * (N + kv_heads) * H
        one_case = case((B, T, N, H), kv_heads=kv_heads, **options)
        compare(one_case, (elements, elements), arguments.rounds, limit)


if __name__ == "__main__":
    main()
