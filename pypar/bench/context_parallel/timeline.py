"""A picture of one step of a ring: what each rank computes, and what is on its way to it meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from pypar.bench.context_parallel.step import Contender, Problem, parts, step
from pypar.bench.context_parallel.workers import Workers
from pypar.bench.timing import DTYPES
from pypar.comm import Handle
from pypar.context_parallel.methods.ring import buffers as ring_buffers
from pypar.context_parallel.methods.ring import method as ring
from pypar.mesh import Axis

COLORS = {"forward": "tab:blue", "backward": "tab:green", "transfer": "tab:orange", "wait": "tab:red"}


class Span(NamedTuple):
    kind: str  # of COLORS
    began: float
    ended: float


def recorded_step(axis: Axis, problem: Problem, contender: Contender) -> list[Span]:
    parts(axis, problem, contender.layout)
    for _ in range(2):  # the first one warms up
        with _recording() as spans:
            torch.distributed.barrier()
            step(axis, problem, contender)
    return spans


@contextlib.contextmanager
def _recording() -> Iterator[list[Span]]:
    """Notes attention, transfers from their start until they have arrived (to a millisecond), and waiting."""
    spans: list[Span] = []
    in_flight: list[tuple[float, Any]] = []
    stop = threading.Event()

    def timed(kind: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            spans.append(Span(kind, began, time.perf_counter()))
            return result

        return run

    def exchange(*arguments: Any) -> Any:
        sent, received = start(*arguments)
        in_flight.extend((time.perf_counter(), work) for handle in received for work in handle._works)
        return sent, received

    def watch() -> None:
        while not stop.wait(0.001):
            for entry in [e for e in in_flight if e[1].is_completed()]:
                spans.append(Span("transfer", entry[0], time.perf_counter()))
                in_flight.remove(entry)

    start, wait = ring_buffers.exchange_start, Handle.wait
    watcher = threading.Thread(target=watch)
    watcher.start()
    with (
        mock.patch.object(ring_buffers, "exchange_start", exchange),
        mock.patch.object(ring, "add_forward", timed("forward", ring.add_forward)),
        mock.patch.object(ring, "add_backward", timed("backward", ring.add_backward)),
        mock.patch.object(Handle, "wait", timed("wait", wait)),
    ):
        yield spans
    stop.set()
    watcher.join()


def draw(by_rank: list[list[Span]], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 0.9 + 0.9 * len(by_rank)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    begin = min(span.began for spans in by_rank for span in spans)
    for rank, spans in enumerate(by_rank):
        for span in spans:
            moves = span.kind == "transfer"
            axes.barh(
                rank + (0.22 if moves else -0.12),
                (span.ended - span.began) * 1e3,
                left=(span.began - begin) * 1e3,
                height=0.2 if moves else 0.42,
                color=COLORS[span.kind],
                edgecolor="white",
                linewidth=0.4,
            )
    axes.set(xlabel="ms", title=title, yticks=range(len(by_rank)))
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(by_rank))])
    axes.invert_yaxis()
    axes.legend(
        handles=[Patch(color=color, label=kind) for kind, color in COLORS.items()],
        ncols=len(COLORS),
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(0, -0.25),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: argparse.Namespace) -> str | None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "--timeline draws with matplotlib, which is not installed; pip install matplotlib"
    size, length, dtype = arguments.ranks[0], arguments.lengths[0], arguments.dtypes[0]
    layout = (arguments.layouts or ["zigzag"])[0]
    with Workers(size, arguments.backend) as workers:
        problem = Problem(length, DTYPES[dtype], not arguments.full)
        by_rank = workers.ranks(recorded_step, problem, Contender("ring", layout))
    title = f"ring attention, forward and backward: {size} ranks, {length} tokens, {dtype}, {layout}"
    draw(by_rank, title, Path(arguments.timeline))
    return None
