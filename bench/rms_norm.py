"""rms_norm against torch.nn.functional.rms_norm, after a check of results and gradients.

    python bench/rms_norm.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: x and out forward; dout, x and dx backward.
"""

import torch
from timing import DTYPES, compare, parse_arguments, print_limit

from pypar.ops import rms_norm


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for rows, size in ((1024, 512), (1024, 4096), (8192, 2048)):
        for name, dtype in DTYPES.items():
            x = torch.randn(rows, size).to(dtype).requires_grad_()
            weight = torch.randn(size).to(dtype).requires_grad_()
            line = compare(
                lambda x, weight: rms_norm(x, weight, 1e-5),
                lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5),
                [x, weight],
                (2 * x.nbytes, 3 * x.nbytes),
                arguments,
            )
            print(f"[{rows:5}, {size:5}] {name}: {line}")


if __name__ == "__main__":
    main()
