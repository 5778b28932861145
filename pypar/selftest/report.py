"""The table that a person reads and the file that goes with a bug report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from pypar.selftest.rows import Limits, NotRun, Row

_COLUMNS = (
    ("operator", 13),
    ("backend", 9),
    ("device", 6),
    ("type", 8),
    ("case", 32),
    ("shape", 31),
    ("error / allowed", 29),
    ("forward", 23),
    ("forward+backward", 23),
    ("peer", 0),
)


def header() -> Iterator[str]:
    yield "A time is followed by torch's time / ours (above 1: pypar is the faster) and the share of what limits it,"
    yield "m: the rate of a large matmul, c: of a large copy (above 100%: the data came from a cache)."
    yield _line([name for name, _ in _COLUMNS])


def line(row: Row) -> str:
    judged = ""
    if row.error is not None and row.allowed is not None:
        judged = f"{row.result} {row.error:.2e} / {row.allowed:.2e}"
    cells = [row.op, row.backend, row.device, row.dtype, row.case, row.shape, judged]
    if row.failure:
        return _line([*cells, f"FAILED: {row.failure}"])
    times = [
        _time(row.forward_ms, row.forward_ratio, row.forward_share, row.limit),
        _time(row.both_ms, row.both_ratio, row.both_share, row.limit),
    ]
    return _line([*cells, *times, row.peer])


def not_run_lines(not_run: Sequence[NotRun], absent: Sequence[str]) -> Iterator[str]:
    """What could not be run and why, what has the same reason together."""
    yield "Not run:"
    yield from (f"  {reason}" for reason in absent)
    groups: dict[str, dict[str, int]] = {}
    for item in not_run:
        group = groups.setdefault(item.reason, {})
        group[item.what] = group.get(item.what, 0) + 1
    for reason, whats in groups.items():
        names = ", ".join(f"{what} ({count})" if count > 1 else what for what, count in whats.items())
        yield f"  {names}: {reason}"
    if not groups and not absent:
        yield "  nothing: everything ran"


def verdict(rows: Sequence[Row]) -> tuple[str, int]:
    """(sentence, exit code)."""
    failed = [row for row in rows if row.failure]
    if failed:
        return f"FAILED: {len(failed)} of {len(rows)} rows", 1
    if not rows:
        return "FAILED: no row was run", 1
    return f"passed: {len(rows)} rows", 0


def limit_lines(limits: Limits) -> Iterator[str]:
    for (device, dtype), rate in limits.matmul.items():
        yield f"limit of {device}: a large matmul in {dtype} does {rate / 1e9:.0f} GFLOP/s"
    for device, rate in limits.copy.items():
        yield f"limit of {device}: a large copy moves {rate / 1e9:.1f} GB/s"


def write(
    path: Path, machine: Sequence[str], rows: Sequence[Row], not_run: Sequence[NotRun], limits: Limits
) -> None:
    report = {
        "machine": list(machine),
        "matmul_flops_per_second": {f"{d} {t}": rate for (d, t), rate in limits.matmul.items()},
        "copy_bytes_per_second": limits.copy,
        "options": asdict(limits.options),
        "verdict": verdict(rows)[0],
        "columns": [f.name for f in fields(Row)],
        "rows": [asdict(row) for row in rows],
        "not_run": [asdict(item) for item in not_run],
    }
    path.write_text(json.dumps(_finite(report), indent=1) + "\n")


def _finite(value: object) -> object:
    """JSON has no infinity: it becomes a word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _line(cells: Sequence[str]) -> str:
    widths = [width for _, width in _COLUMNS]
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return " ".join(padded).rstrip()


def _time(ms: float | None, ratio: float | None, share: float | None, limit: str) -> str:
    if ms is None or share is None:
        return ""
    beside = "    -" if ratio is None else f"{ratio:4.1f}x"
    return f"{ms:7.3f} ms {beside} {share:3.0%} {limit[:1]}"
