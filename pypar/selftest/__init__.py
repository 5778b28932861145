"""Runs every operator on every backend of this machine, judges the results, and compares the times with torch's.

A new operator is found by being in pypar.ops, and its cases by being `<op>.py` in pypar/selftest/cases. judge.py says
what is right, for the tests and benches too.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pypar.selftest import report
from pypar.selftest.rows import Limits, NotRun, Options, Row, run

__all__ = ["Options", "absent", "main"]


def main(options: Options, machine: Sequence[str], path: Path) -> int:
    """Prints the table and writes `path`. machine: lines that describe it. Returns the exit code."""
    started = time.monotonic()
    for line in [*machine, "", *report.header()]:
        print(line, flush=True)
    limits = Limits(options)
    rows: list[Row] = []
    not_run: list[NotRun] = []
    for item in run(options, limits):
        if isinstance(item, Row):
            rows.append(item)
            print(report.line(item), flush=True)
        else:
            not_run.append(item)
    missing = [NotRun("everything", reason) for reason in absent()]
    for line in [
        "",
        *report.limit_lines(limits),
        "",
        *report.not_run_lines(not_run, absent()),
        "",
        *(report.line(row) for row in rows if row.failure),
    ]:
        print(line)
    report.write(path, machine, rows, missing + not_run, limits)
    sentence, code = report.verdict(rows)
    print(f"{sentence}, {time.monotonic() - started:.0f} s; {path} says it for a bug report")
    return code


def absent() -> list[str]:
    """What this machine lacks, for which whole backends cannot run."""
    reasons = []
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} but sees no GPU" if built else "torch is built without CUDA"
        reasons.append(f"everything on a GPU: {why}")
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton's kernels: triton is not installed (pip install triton)")
    if importlib.util.find_spec("pypar._cuda") is None:
        reasons.append(
            "CUDA's kernels: pypar._cuda was not built (nvcc was not there when pypar was installed)"
        )
    return reasons
