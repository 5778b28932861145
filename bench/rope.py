"""rope against the usual PyTorch form (x * cos + rotate_half(x) * sin), after a check of the results.

    python bench/rope.py [--threads 2] [--rounds 15]

GB/s counts what must move at least: x and out forward; dout and dx backward.
"""

import torch
from timing import DTYPES, compare, parse_arguments, print_limit
from torch import Tensor

from pypar.ops import rope


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In x's dtype, as Hugging Face's Llama does; the tables are made once outside, as there."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def main() -> None:
    arguments = parse_arguments(__doc__)
    print_limit(arguments)
    for shape in ((1, 1024, 8, 64), (1, 4096, 32, 128)):
        angle = torch.rand(shape[1], shape[3] // 2) * 100
        cos, sin = angle.cos(), angle.sin()
        for name, dtype in DTYPES.items():
            x = torch.randn(shape).to(dtype).requires_grad_()
            tables = {
                kind: [torch.cat((t, t), -1).unsqueeze(1).to(kind) for t in (cos, sin)]
                for kind in (dtype, torch.float64)
            }
            line = compare(
                lambda x: rope(x, cos, sin),  # noqa: B023
                lambda x: plain(x, *tables[x.dtype]),  # noqa: B023
                [x],
                (2 * x.nbytes, 2 * x.nbytes),
                arguments,
            )
            print(f"{shape} {name}: {line}")


if __name__ == "__main__":
    main()
