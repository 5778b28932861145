"""``python -m pypar.cli``."""

import sys

from pypar.cli import main

if __name__ == "__main__":
    sys.exit(main())
