"""layer_norm against torch.nn.functional.layer_norm in eager mode, after a check of results and gradients.

    python bench/layer_norm.py [--threads 2] [--rounds 15]

Bound: the bytes that must move at least, at the rate of a copy.
"""

from pypar.selftest.cases.layer_norm import case
from pypar.selftest.compare import compare_norms

if __name__ == "__main__":
    compare_norms(__doc__, case)
