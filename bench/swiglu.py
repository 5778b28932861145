"""swiglu against torch's silu(gate) * up, after a check of results and gradients.

    python bench/swiglu.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: gate, up and out forward; dout, gate, up and two gradients backward.
"""

import torch
from timing import DTYPES, compare, parse_arguments, print_limit

from pypar.ops import swiglu


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for rows, size in ((1024, 1408), (1024, 11008)):
        for name, dtype in DTYPES.items():
            gate, up = (torch.randn(rows, size).to(dtype).requires_grad_() for _ in range(2))
            line = compare(
                swiglu,
                lambda gate, up: torch.nn.functional.silu(gate) * up,
                [gate, up],
                (3 * gate.nbytes, 5 * gate.nbytes),
                arguments,
            )
            print(f"[{rows:5}, {size:5}] {name}: {line}")


if __name__ == "__main__":
    main()
