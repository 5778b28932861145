"""cross_entropy against torch.nn.functional.cross_entropy, after a check of results and gradients.

    python bench/cross_entropy.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: the logits forward; the logits and their gradient backward.
"""

import torch
from timing import DTYPES, compare, parse_arguments, print_limit

from pypar.ops import cross_entropy


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for rows, size in ((1024, 512), (1024, 32000)):
        targets = torch.randint(0, size, (rows,))
        for name, dtype in DTYPES.items():
            logits = torch.randn(rows, size).mul(4).to(dtype).requires_grad_()
            line = compare(
                lambda logits: cross_entropy(logits, targets),  # noqa: B023
                lambda logits: torch.nn.functional.cross_entropy(logits, targets, reduction="none"),  # noqa: B023
                [logits],
                (logits.nbytes, 2 * logits.nbytes),
                arguments,
            )
            print(f"[{rows:5}, {size:5}] {name}: {line}")


if __name__ == "__main__":
    main()
