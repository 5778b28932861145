"""What a run's configuration says about context parallelism: the section ``context``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pypar.grid import POSITIONS
from pypar.settings import Run, Section, setting


def _layouts() -> Iterable[str]:
    from pypar.context_parallel.layouts import LAYOUTS

    return LAYOUTS


def _methods() -> Iterable[str]:
    from pypar.context_parallel.methods.registry import methods

    return methods()


@dataclass(frozen=True)
class ContextConfig(Section):
    """How a sequence is spread over the cp axis, and how attention sees the whole of it."""

    layout: str = setting("zigzag", choices=_layouts, help="which positions a rank holds")
    method: str = setting(
        "ring",
        choices=_methods,
        help='how keys and values are reached; "auto": by the method that should be fastest',
    )
    ulysses_size: int = setting(
        0,
        at_least=0,
        help='ranks that share heads in "hybrid"; 0: as many as there are key/value heads for',
    )

    @property
    def method_options(self) -> dict[str, int]:
        """The options of `pypar.ring_attention` that belong to the method."""
        return {"ulysses_size": self.ulysses_size} if self.method == "hybrid" and self.ulysses_size else {}

    def num_positions(self, length: int, axes: Mapping[str, int]) -> list[int]:
        """How many of a sequence's positions each rank of the axis has. ValueError where they are too few."""
        size = axes[POSITIONS]
        if size == 1:
            return [length]
        _check_length(length, size)
        from pypar.context_parallel.layouts import num_positions, segments_of

        return [num_positions(segments_of(length, rank, size, self.layout)) for rank in range(size)]

    def check(self, run: Run) -> Sequence[str]:
        """Every rank holds a position, and there are heads for the ranks that share them."""
        cp = run.axes[POSITIONS]
        if cp == 1:
            return ()
        _check_length(run.sequence_length, cp)
        sharing = {"ulysses": cp, "hybrid": self.ulysses_size or 1}.get(self.method, 1)
        if cp % sharing:
            divisors = ", ".join(str(n) for n in range(1, cp + 1) if cp % n == 0)
            raise ValueError(
                f"context.ulysses_size ({sharing}) must divide the cp size ({cp}); use one of {divisors}"
            )
        heads = run.num_heads
        if heads is not None and sharing > heads:
            raise ValueError(
                f"context.method {self.method!r} shares the {heads} query heads of a rank between {sharing} cp "
                'ranks, which are more; use context.method "ring" or "hybrid" with a smaller context.ulysses_size'
            )
        if self.method == "hybrid" and self.layout == "striped" and sharing < cp:
            raise ValueError(
                'context.method "hybrid" needs a layout of chunks; use context.layout "zigzag" or "contiguous"'
            )
        return ()


def _check_length(length: int, cp: int) -> None:
    if length < cp:
        raise ValueError(
            f"train.sequence_length ({length}) must be at least the cp size ({cp}): each rank holds a position"
        )
