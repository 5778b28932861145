"""What a run says of itself: a progress bar, one JSON object a step, and a picture of the loss curve."""

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from pypar.files.json import parse_json
from pypar.ops import linear

FLOP_CONVENTION = (
    "model FLOPs a token = 6 x matmul parameters + 6 x layers x heads x head size x T (causal half)"
)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """FLOP/s of a size^3 matrix product on this rank, here and now (median of 5): what MFU is measured against.

    size: by default 1024 on a CPU, where it comes within 10 % of 2048's rate and a run begins 10 s sooner in bf16.
    """
    size = size or (1024 if device.type == "cpu" else 2048)
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        product = linear(a, a)  # by the library that the layers use
        float(product[0, 0])  # waits for a device to finish
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


class Metrics:
    """Writes ``metrics.jsonl`` and the progress bar; only the rank that is given a directory writes."""

    def __init__(self, directory: Path | None, num_steps: int, first_step: int) -> None:
        self.path = directory / "metrics.jsonl" if directory else None
        self.bar: tqdm | None = None
        self.num_steps = num_steps
        self.validation = ""  # the latest, kept in sight
        if self.path is None:
            return
        # A skipped update has the step of the one before it, after which the checkpoint was written.
        kept = [
            line for line in self.read(self.path) if line["step"] + bool(line.get("skipped")) <= first_step
        ]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1)
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The objects of a metrics file, to the first line that is none, as a kill may have cut the last short."""
        if not path.exists():
            return []
        lines = []
        for line in path.read_bytes().splitlines():
            try:
                value = parse_json(line)
            except ValueError:
                break
            if not isinstance(value, dict) or type(value.get("step")) is not int:
                break
            lines.append(value)
        return lines

    def write(self, line: Mapping[str, object], *, show: bool) -> None:
        """Record a step; ``show``: also as a line of text where there is no terminal for a bar."""
        if self.path is None or self.bar is None:
            return
        self.file.write(json.dumps({name: _as_json(value) for name, value in line.items()}) + "\n")
        text = (
            f"loss {line['loss']:.4f}, {line['tokens_per_s']:,.0f} tokens/s, MFU {line['mfu']:.0%}, "
            f"waiting {line['wait_share']:.0%}"
        )
        if line.get("skipped"):
            text += f", update skipped: gradients overflowed with a loss scale of {line['loss_scale']:g}"
        if "val_loss" in line:
            self.validation = f", validation {line['val_loss']:.4f} at {line['step']}"
        text += self.validation
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(0 if line.get("skipped") else 1)
        if self.bar.disable and show:
            self.say(f"step {line['step']}/{self.num_steps}: {text}")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar (only on the rank that writes)."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.file.close()


def _as_json(value: object) -> object:
    """JSON has no infinity: null, as of the gradient norm where an update was skipped."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_loss_curve(metrics: list[dict], levels: Mapping[str, float], path: Path) -> None:
    """PNG of training and validation loss (nats a token) against steps; ``levels``: horizontal lines to compare."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [m for m in metrics if not m.get("skipped")]
    axes.plot(
        [m["step"] for m in trained], [m["loss"] for m in trained], lw=0.8, color="tab:blue", label="training"
    )
    validated = [m for m in metrics if "val_loss" in m]
    axes.plot(
        [m["step"] for m in validated],
        [m["val_loss"] for m in validated],
        "o-",
        color="tab:red",
        label="validation",
    )
    for (name, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color="gray", ls=style, lw=1, label=f"{name} {level:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
