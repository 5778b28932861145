"""Draws schedules as Gantt charts into SVG or PNG: a row a rank, time from left to right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, INPUT_GRADIENT, UPDATE, WEIGHT_GRADIENT
from pypar.pipeline_parallel.simulate import Simulation

SUFFIXES = (".svg", ".png")
# In points.
DIGIT, FONT = 4.2, 7
ROW, TITLE, LEGEND, MARGIN = 16.0, 18.0, 22.0, 44.0
LEAST_WIDTH, MOST_WIDTH = 500.0, 8000.0
PNG_SCALE = 2  # pixels a point

RGB = tuple[int, int, int]
GROUND: RGB = (240, 240, 240)
COLORS: Mapping[str, RGB] = {
    FORWARD: (105, 165, 235),
    BACKWARD: (105, 195, 120),
    INPUT_GRADIENT: (110, 210, 200),
    WEIGHT_GRADIENT: (245, 185, 100),
    UPDATE: (140, 120, 150),
}
WORDS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRADIENT: "input gradient",
    WEIGHT_GRADIENT: "weight gradient",
    UPDATE: "update",
}
DARKEST = 0.72  # the last stage of a rank beside its first one


@dataclass(frozen=True)
class Box:
    """A rectangle with a label in its middle, or to its right where it is `beside`; in points from the left and top."""

    left: float
    top: float
    width: float
    height: float
    color: RGB
    label: str = ""
    border: float = 0.3
    beside: bool = False


@dataclass(frozen=True)
class Drawing:
    """All boxes, and titles as (left, bottom, words), on a sheet of this size."""

    width: float
    height: float
    boxes: list[Box]
    titles: list[tuple[float, float, str]]


def check_path(path: str | Path) -> None:
    """ValueError for a file that is neither SVG nor PNG."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(
            f"a picture is written to a file that ends in {' or '.join(SUFFIXES)}, not to {path}"
        )


def draw(simulations: Mapping[str, Simulation], path: str | Path) -> None:
    """Writes one chart beneath the other, each under its name, all on one scale of time.

    Every box is an action with its microbatch; darker boxes are of later stages of the rank, boxes with a bold border
    of the second path; the two actions of a pair share the height of a row. The sheet grows with the number of actions,
    so that a box has room for its number.

    ValueError for a file that is neither SVG nor PNG.
    """
    check_path(path)
    drawing = charts(simulations)
    if Path(path).suffix == ".svg":
        Path(path).write_text(_svg(drawing), encoding="utf-8")
    else:
        _png(drawing, path)


def charts(simulations: Mapping[str, Simulation]) -> Drawing:
    """What `draw` draws."""
    longest = max(max(row[-1] for row in each.end if row) for each in simulations.values())
    width = min(MOST_WIDTH, max(LEAST_WIDTH, longest * _points(simulations)))
    scale = width / longest
    boxes: list[Box] = []
    titles: list[tuple[float, float, str]] = []
    top = 0.0
    for name, each in simulations.items():
        titles.append((MARGIN, top + 13, _title(name, each)))
        top += TITLE
        for rank in range(each.schedule.num_ranks):
            titles.append((4, top + 0.7 * ROW, f"rank {rank}"))
            boxes.append(Box(MARGIN, top, width, ROW, GROUND, border=0))
            boxes += _row(each, rank, top, scale)
            top += ROW
    kinds = {a.kind for each in simulations.values() for actions in each.schedule.lists for a in actions}
    left = MARGIN
    for kind in (kind for kind in COLORS if kind in kinds):
        boxes.append(Box(left, top + 7, 14, 10, COLORS[kind], WORDS[kind], beside=True))
        left += 30 + DIGIT * len(WORDS[kind])
    return Drawing(MARGIN + width + 4, top + LEGEND, boxes, titles)


def _points(simulations: Mapping[str, Simulation]) -> float:
    """How many points a unit of time takes, for numbers to fit into all but a few short boxes."""
    needed = [
        (2 + DIGIT * len(str(action.microbatch))) / (end - begin)
        for each in simulations.values()
        for lists in zip(each.schedule.lists, each.start, each.end, strict=True)
        for action, begin, end in zip(*lists, strict=True)
        if end > begin and action.kind != UPDATE
    ]
    return sorted(needed)[int(0.98 * (len(needed) - 1))] if needed else 1.0


def _title(name: str, simulation: Simulation) -> str:
    return (
        f"{name}: makespan {simulation.makespan:.5g}, bubble {simulation.makespan_bubble:.1%}, within spans "
        f"{simulation.span_bubble:.1%}, at most {max(simulation.peak_memory):.4g} of activations"
    )


def _row(simulation: Simulation, rank: int, top: float, scale: float) -> Iterator[Box]:
    schedule = simulation.schedule
    stages = sorted({stage for _, stage in schedule.stages_of(rank)})
    for position, action in enumerate(schedule.lists[rank]):
        begin, end = simulation.start[rank][position], simulation.end[rank][position]
        first, second = ((rank, each) in schedule.pairs for each in (position, position - 1))
        part = DARKEST + (1 - DARKEST) * (1 - stages.index(action.stage) / max(1, len(stages) - 1))
        red, green, blue = (round(part * value) for value in COLORS[action.kind])
        yield Box(
            MARGIN + begin * scale,
            top + 0.5 + second * (ROW / 2 - 0.5),
            (end - begin) * scale,
            ROW / 2 - 0.5 if first or second else ROW - 1,
            (red, green, blue),
            str(action.microbatch) if end > begin else "",
            border=1.0 if action.path else 0.3,
        )


def _svg(drawing: Drawing) -> str:
    width, height = f"{drawing.width:.0f}", f"{drawing.height:.0f}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{FONT}" text-anchor="middle" stroke-width=".3">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for left, bottom, words in drawing.titles:
        lines.append(f'<text x="{left:g}" y="{bottom:g}" text-anchor="start">{escape(words)}</text>')
    for box in drawing.boxes:
        place = f'x="{box.left:.1f}" y="{box.top:g}" width="{box.width:.1f}" height="{box.height:g}"'
        border = ' stroke="#000"' * (box.border > 0) + f' stroke-width="{box.border:g}"' * (box.border > 0.5)
        lines.append(f'<rect {place} fill="#{bytes(box.color).hex()}"{border}/>')
        if box.label:
            x = box.left + (box.width + 4 if box.beside else box.width / 2)
            y = box.top + box.height / 2 + 0.36 * FONT
            anchor = ' text-anchor="start"' * box.beside
            lines.append(f'<text x="{x:.1f}" y="{y:.1f}"{anchor}>{escape(box.label)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _png(drawing: Drawing, path: str | Path) -> None:
    from matplotlib.figure import Figure  # which takes 0.3 s to import
    from matplotlib.patches import Rectangle

    inch = 72
    figure = Figure(figsize=(drawing.width / inch, drawing.height / inch))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    for left, bottom, words in drawing.titles:
        axes.text(left, bottom, words, fontsize=FONT)
    for box in drawing.boxes:
        red, green, blue = (value / 255 for value in box.color)
        corner = box.left, box.top
        look = Rectangle(corner, box.width, box.height, facecolor=(red, green, blue), edgecolor="black")
        look.set_linewidth(box.border)
        axes.add_patch(look)
        if box.label:
            x = box.left + (box.width + 4 if box.beside else box.width / 2)
            ha = "left" if box.beside else "center"
            axes.text(x, box.top + box.height / 2, box.label, fontsize=FONT, ha=ha, va="center_baseline")
    figure.savefig(path, dpi=PNG_SCALE * inch)
