"""What tensor parallelism asks of a run's configuration: sizes that its ranks divide. It has no section of its own."""

import math
from collections.abc import Mapping

from pypar.settings import Run, check_divides, multiples_near

AXES = ("tp",)  # over which layers are cut


def num_ranks(axes: Mapping[str, int]) -> int:
    """The ranks over which layers are cut, of a mesh with these axes."""
    return math.prod(axes[name] for name in AXES)


def check_cut(section: str, sizes: Mapping[str, int], run: Run) -> None:
    """ValueError where the ranks do not divide a size by which a model is cut; ``section`` has them as keys."""
    for name, size in sizes.items():
        check_divides(f"{section}.{name}", size, num_ranks(run.axes), f"the {' x '.join(AXES)} size")


def check_sequence_parallel(run: Run) -> None:
    """ValueError where the ranks do not divide the positions that lie between layers."""
    size, sharing = num_ranks(run.axes), len(run.num_positions)
    for rank, held in enumerate(run.num_positions):
        if held % size:
            rule, whose = f"the {' x '.join(AXES)} size ({size})", ""
            if sharing > 1:
                rule = f"the ranks of sequence parallel, {sharing} x {' x '.join(AXES)} ({sharing * size})"
                whose = f": of the {sharing} parts of a sequence, part {rank} has {held} positions"
            raise ValueError(
                f"train.sequence_length ({run.sequence_length}) must divide by {rule}{whose}; use "
                f"{multiples_near(run.sequence_length, sharing * size)}"
            )
