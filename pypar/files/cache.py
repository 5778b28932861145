"""Where pypar keeps files of its own."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again: $XDG_CACHE_HOME/pypar, by default ~/.cache/pypar. It need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pypar"
