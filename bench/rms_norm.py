"""rms_norm against torch.nn.functional.rms_norm in eager mode, after a check of results and gradients.

    python bench/rms_norm.py [--threads 2] [--rounds 15]

Bound: the bytes that must move at least, at the rate of a copy.
"""

from pypar.selftest.cases.rms_norm import case
from pypar.selftest.compare import compare_norms

if __name__ == "__main__":
    compare_norms(__doc__, case)
