"""swiglu, geglu and clamped_swiglu against torch's activations, after a check of results and gradients.

    python bench/gated.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: gate, up and out forward; dout, gate, up and two gradients backward.
"""

from pypar.selftest.cases.gated import OURS, case
from pypar.selftest.compare import compare, parse_arguments, print_limit


def main() -> None:
    arguments = parse_arguments(__doc__)
    limit = print_limit(arguments)
    calls = [(name, "two tensors") for name in OURS]
    calls += [("swiglu", "halves"), ("clamped_swiglu", "interleaved")]
    for rows, size in ((4096, 1024), (1024, 11008)):
        for name, memory in calls if size == 1024 else calls[:1]:
            one_case = case((rows, size), name, memory)
            compare(one_case, (3 * rows * size, 5 * rows * size), arguments.rounds, limit)


if __name__ == "__main__":
    main()
