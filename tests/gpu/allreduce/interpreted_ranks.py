"""Runs all-reduce's Triton kernels in Triton's interpreter, one process a rank, on memory that the processes share:
the flags are exchanged for real. TRITON_INTERPRET must be set before kernels are imported, hence a program of its own,
whose forks the ranks are.

    InterpretedRanks().run(ranks, calls) -> for each rank (results of its calls, its error word)
"""

import contextlib
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import ROOT


class Call(NamedTuple):
    """inputs: by rank (x,) or (x, residual, weight); None: this rank does not take part."""

    kind: str  # "one-shot", "two-shot", "residual norm"
    inputs: list[tuple[Tensor, ...] | None]


class InterpretedRanks:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.gpu.allreduce.interpreted_ranks",
            ],  # which unpickles Call by this name
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            start_new_session=True,
        )

    def run(
        self, ranks: int, calls: list[Call], limit: int = 1 << 40, seed: int = 0
    ) -> list[tuple[list, int]]:
        """limit: polls of one wait. seed: of the ranks' pauses."""
        late = threading.Timer(100, self.close)
        late.start()
        try:
            pickle.dump((ranks, calls, limit, seed), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        finally:
            late.cancel()

    def close(self) -> None:
        """Ends the process and the ranks that it may have."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def launches(workspace: Any, call: Call) -> tuple[list, list[Tensor]]:
    """(launches, results) of a call on this workspace's rank."""
    from pypar.kernels.allreduce_launches import all_reduce_launch, residual_norm_launch

    inputs = call.inputs[workspace.rank]
    if call.kind == "residual norm":
        out, kept = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
        return [residual_norm_launch(workspace, *inputs, 1e-5, out, kept)], [out, kept]
    y = torch.empty_like(inputs[0])
    return [all_reduce_launch(workspace, inputs[0], y, call.kind == "two-shot")], [y]


def _rank(workspace: Any, calls: list[Call], seed: int) -> tuple[list, int]:
    pauses, results = random.Random(seed * 100 + workspace.rank), []
    for call in calls:
        if call.inputs[workspace.rank] is None:
            continue
        time.sleep(pauses.choice((0, 0, 0.01, 0.05)))
        todo, made = launches(workspace, call)
        for launch in todo:
            launch.run()
        results.append(made)
    return results, workspace.error.item()


def _run(ranks: int, calls: list[Call], limit: int, seed: int) -> list[tuple[list, int]]:
    from pypar.kernels import allreduce_launches as allreduce

    max_bytes = max(x[0].nbytes for call in calls for x in call.inputs if x is not None)
    size = allreduce.buffer_bytes(max_bytes, ranks)
    memory = torch.frombuffer(mmap.mmap(-1, size * ranks), dtype=torch.uint8)  # shared with the forked ranks
    addresses = torch.tensor([memory.data_ptr() + rank * size for rank in range(ranks)])
    pipes = []
    for rank in range(ranks):
        read, write = os.pipe()
        if os.fork() == 0:
            error, slot = torch.zeros(1, dtype=torch.int64), allreduce.slot_bytes(max_bytes, ranks)
            workspace = allreduce.Workspace(addresses, error, rank, slot, limit)
            with os.fdopen(write, "wb") as out:
                pickle.dump(_rank(workspace, calls, seed), out)
            os._exit(0)
        os.close(write)
        pipes.append(read)
    results = []
    for read in pipes:
        with os.fdopen(read, "rb") as pipe:
            results.append(pickle.load(pipe))
        os.wait()
    return results


def _main() -> None:
    torch.set_num_threads(1)
    while True:
        try:
            asked = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_run(*asked), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
