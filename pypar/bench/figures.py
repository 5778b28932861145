"""Figures of several benches in one form: as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """What pypar took for something, and what a named peer took for the same in the same run.

    bench: the operator, "all_reduce", "train" ...; what: the case; call: "forward", "forward and backward", "step" ...
    share: of the rate that `limit` names ("copy" or "matmul"), measured in the same run; None where there is none.
    """

    bench: str
    what: str
    dtype: str
    call: str
    seconds: float
    peer: str
    peer_seconds: float | None
    limit: str = ""
    share: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer pypar is."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds


_COLUMNS = (
    ("bench", 22),
    ("case", 40),
    ("type", 9),
    ("call", 21),
    ("pypar", 12),
    ("ratio", 8),
    ("share", 12),
)


def header() -> Iterator[str]:
    yield "ratio: the peer's time by pypar's, above 1: pypar is the faster. share: of the rate of a large copy or of a"
    yield "large matmul here (above 100%: the data came from a cache)."
    yield _line([*(name for name, _ in _COLUMNS), "peer"])


def line(figure: Figure) -> str:
    ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}x"
    share = "" if figure.share is None else f"{figure.share:.0%} {figure.limit}"
    cells = [figure.bench, figure.what, figure.dtype, figure.call, _time(figure.seconds), ratio, share]
    return _line([*cells, figure.peer])


def write(path: Path, machine: Sequence[str], figures: Iterable[Figure]) -> None:
    """The figures as JSON, with the lines that describe the machine."""
    rows = [asdict(figure) | {"ratio": figure.ratio} for figure in figures]
    path.write_text(json.dumps({"machine": list(machine), "figures": rows}, indent=1) + "\n")


def draw(path: Path, machine: Sequence[str], figures: Iterable[Figure]) -> None:
    """A bar for each figure that has a peer: how many times faster than it pypar is, on a logarithmic scale."""
    from matplotlib.figure import Figure as Picture

    shown = [(figure, figure.ratio) for figure in figures if figure.ratio is not None]
    picture = Picture(figsize=(11, 1.5 + 0.2 * len(shown)), layout="constrained")
    axes = picture.add_subplot()
    places = range(len(shown), 0, -1)
    axes.barh(
        places,
        [ratio - 1 for _, ratio in shown],
        left=1,
        color=["#2a7f62" if ratio >= 1 else "#b5483a" for _, ratio in shown],
    )
    axes.set_xscale("log")
    axes.set_yticks(places, [f"{f.bench}, {f.what}, {f.dtype}, {f.call}" for f, _ in shown], fontsize=7)
    for place, (figure, ratio) in zip(places, shown, strict=True):
        axes.text(max(ratio, 1), place, f" {ratio:.2f}x {figure.peer}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(min([0.5, *(r for _, r in shown)]), 4 * max([2.0, *(r for _, r in shown)]))
    axes.set_xlabel("times faster than the peer")
    axes.set_title("; ".join(machine[:2]), fontsize=8)
    picture.savefig(path, dpi=120)


def _line(cells: Sequence[str]) -> str:
    widths = [width for _, width in _COLUMNS]
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return " ".join([*padded, *cells[len(widths) :]]).rstrip()


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
