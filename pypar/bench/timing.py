"""Times of functions that take turns, and the rates that limit them: how the benches and the self-test measure."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

Contenders = Mapping[str, Callable[[], object]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_CPU_BATCH_S, _GPU_BATCH_S = 0.01, 0.002  # calls shorter than this are timed several at once
_LEAST_ROUNDS = 3
_MATMUL_SIZES = {"cpu": (2048, 2048), "cuda": (4096, 8192)}  # fp32, 16 bits
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # beyond the caches


def times(
    contenders: Contenders, device: str = "cpu", rounds: int = 15, budget_s: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of one call of each contender, one number a round; in a round each has its turn.

    The first call warms up. A contender stops when it has run for budget_s, but not before three rounds; one
    whose first call takes longer than budget_s is done with that call.
    """
    records: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for name, run in contenders.items():
        first = _seconds(run, 1, device)
        if device != "cpu" and first > budget_s:  # a kernel may have been compiled
            first = _seconds(run, 1, device)
        records[name] = [first] if first > budget_s else []
        if not records[name]:
            batch_s = _CPU_BATCH_S if device == "cpu" else _GPU_BATCH_S
            calls[name] = max(1, round(min(batch_s, budget_s) / _seconds(run, 1, device)))
    for _ in range(rounds):
        for name, count in calls.items():
            record = records[name]
            if len(record) < _LEAST_ROUNDS or sum(record) * count < budget_s:
                record.append(_seconds(contenders[name], count, device))
    return records


def median_seconds(
    contenders: Contenders, device: str = "cpu", rounds: int = 15, budget_s: float = math.inf
) -> dict[str, float]:
    """The median of each contender's times."""
    return {
        name: statistics.median(record)
        for name, record in times(contenders, device, rounds, budget_s).items()
    }


def best_seconds(contenders: Contenders, rounds: int = 15) -> dict[str, float]:
    """The least of each contender's times, which other processes disturb least."""
    return {name: min(record) for name, record in times(contenders, rounds=rounds).items()}


def bind_threads() -> None:
    """Starts the program again with each OpenMP thread bound to a core of its own, unless the caller has decided.

    Unbound, two threads may share one core for seconds, which moves every figure by a factor of two.
    """
    if "OMP_PROC_BIND" not in os.environ:
        os.environ["OMP_PROC_BIND"] = "true"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def matmul_rate(
    dtype: torch.dtype, device: str = "cpu", rounds: int = 15, budget_s: float = math.inf
) -> float:
    """FLOP/s of x @ w.T of large square matrices, by the fastest library of this torch."""
    size = _MATMUL_SIZES[device][dtype.itemsize < 4]
    x, w = torch.randn(2, size, size, device=device).to(dtype).unbind()
    contenders: dict[str, Callable[[], object]] = {"torch": lambda: x @ w.T}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        contenders["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    for name in list(contenders):
        try:
            contenders[name]()
        except RuntimeError:  # not in this build of torch, or not for this dtype
            del contenders[name]
    return 2 * size**3 / min(map(min, times(contenders, device, rounds, budget_s).values()))


def copy_rate(device: str = "cpu", rounds: int = 15, budget_s: float = math.inf) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.randn(_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    record = times({"copy": lambda: target.copy_(source)}, device, rounds, budget_s)["copy"]
    return 2 * source.nbytes / min(record)


def _seconds(run: Callable[[], object], calls: int, device: str) -> float:
    """The seconds of one call, where `calls` of them run in a row."""
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return max((time.perf_counter() - started) / calls, 1e-9)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) / 1e3 / calls, 1e-9)
