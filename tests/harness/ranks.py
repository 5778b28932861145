"""Pools of rank processes that live for a whole test session, and a watchdog that explains a hung test.

    def _sum(value):                      # module-level function of the test file; runs in every rank
        ...
    def test_sum(ranks):
        assert ranks(2, _sum, 3) == [6, 6]

One pool per world size is started when it is first asked for (forkserver with torch loaded, so this process
never forks), with gloo over loopback, a file store, one thread a rank, and the environment in which the first
pool was started. Arguments and results are pickled by value. When a rank raises, dies or does not answer in time
the pool is killed, `RankError` tells what happened, and the next test gets a new pool.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.harness.forkserver import forkserver

STATUS_BYTES = 256  # per rank: its latest collective, as text
START_TIMEOUT_S = 120.0  # torch is loaded in it


class RankError(AssertionError):
    """A rank raised, died, or did not answer in time."""


class RankPools:
    """Calls fn in every rank of a pool: pools(world_size, fn, *args, timeout_s=60) -> results by rank."""

    def __init__(self, folder: Path) -> None:
        """folder: where each pool keeps its files, in a folder of its own, as long as it lives."""
        self._folder = folder
        self._pools: dict[int, _Pool] = {}

    def __call__(
        self, world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0
    ) -> list[Any]:
        __tracebackhide__ = True
        pool = self._pools.get(world_size)
        if pool is None:
            pool = self._pools[world_size] = _Pool(world_size, self._folder)
        try:
            results = pool.call(fn, args, timeout_s)
        except BaseException:
            del self._pools[world_size]
            pool.kill()
            raise
        pool.print_output()
        return results

    def process_ids(self, world_size: int) -> list[int]:
        """The ranks' process ids, [] before the pool was started."""
        pool = self._pools.get(world_size)
        return [process.pid for process in pool.processes] if pool else []

    def close(self) -> None:
        """End every rank process and remove every file."""
        for pool in self._pools.values():
            pool.kill()
        self._pools.clear()


class _Pool:
    """The parent's end of one set of ranks."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        (self.folder / "status").write_bytes(bytes(STATUS_BYTES * world_size))
        context = forkserver()
        self.connections: list[multiprocessing.connection.Connection] = []
        self.processes: list[Any] = []
        self.ready = False
        self.outputs = []
        for rank in range(world_size):
            (self.folder / f"output{rank}").touch()
            self.outputs.append(open(self.folder / f"output{rank}", errors="replace"))  # noqa: SIM115
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, str(self.folder), theirs),
                daemon=True,
                name=f"rank{rank}",
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        __tracebackhide__ = True
        path = sys.modules[fn.__module__].__file__
        if "." in fn.__qualname__ or path is None:
            raise ValueError(
                f"{fn.__qualname__} must be a module-level function of a file for ranks to load it"
            )
        message = pickle.dumps((path, fn.__module__, fn.__qualname__, pickle.dumps(args)))
        if not self.ready:
            self._collect("the start", START_TIMEOUT_S)
            self.ready = True
        for connection in self.connections:
            connection.send_bytes(message)
        return self._collect(fn.__qualname__, timeout_s)

    def _collect(self, name: str, timeout_s: float) -> list[Any]:
        """One answer of every rank, in rank order."""
        __tracebackhide__ = True
        payloads: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(payloads) < len(self.processes):
            waiting = [rank for rank in range(len(self.processes)) if rank not in payloads]
            connections = [self.connections[rank] for rank in waiting]
            ready = multiprocessing.connection.wait(connections, max(0.0, deadline - time.monotonic()))
            if not ready:
                done = f"; ranks {sorted(payloads)} have finished" if payloads else ""
                raise RankError(f"{name} did not finish in {timeout_s:g} s{done}\n{self._describe(waiting)}")
            rank = next(rank for rank in waiting if self.connections[rank] in ready)
            try:
                succeeded, payloads[rank] = pickle.loads(self.connections[rank].recv_bytes())
            except (EOFError, OSError):
                succeeded = False
            if not succeeded:
                raise RankError(self._failure(name, rank, payloads.get(rank)))
        return [pickle.loads(payloads[rank]) for rank in sorted(payloads)]

    def _failure(self, name: str, failed: int, raised: str | None) -> str:
        """Which ranks died, and what the failed one raised (after a death only that its peer is gone)."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], 0.5)
        dead = [rank for rank, process in enumerate(self.processes) if not process.is_alive()]
        lines = [f"rank {rank} died in {name}, exit code {self.processes[rank].exitcode}" for rank in dead]
        if raised is not None or not dead:
            lines.append(f"rank {failed} of {len(self.processes)} raised in {name}:\n{raised}")
        return "\n".join([*lines, self._describe([])])

    def print_output(self) -> None:
        """Print what the ranks printed since the last time, for pytest to show with a failed test."""
        for rank, output in enumerate(self.outputs):
            for line in output.read().splitlines():
                print(f"[rank {rank}] {line}")

    def _status(self, rank: int) -> str:
        text = (self.folder / "status").read_bytes()[rank * STATUS_BYTES : (rank + 1) * STATUS_BYTES]
        return text.rstrip(b"\0").decode(errors="replace") or "no collective yet"

    def _describe(self, waiting: list[int]) -> str:
        """For every rank its last collective; for the waiting ones also where they are, as Python's stack."""
        for rank in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)
        lines = [f"rank {rank}: last {self._status(rank)}" for rank in range(len(self.processes))]
        for rank in waiting:
            stack = self.folder / f"stack{rank}"
            if stack.exists():
                lines.append(f"stack of rank {rank}:\n{stack.read_text()}")
        return "\n".join(lines)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        for connection in self.connections:
            connection.close()
        self.print_output()
        for output in self.outputs:
            output.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _rank_main(
    rank: int, world_size: int, folder: str, connection: multiprocessing.connection.Connection
) -> None:
    """The life of one rank process: answer calls until the connection closes."""
    _die_with_parent(folder)
    _print_to(Path(folder) / f"output{rank}")
    stack_file = open(Path(folder) / f"stack{rank}", "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    _report_collectives(Path(folder) / "status", rank)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that a test starts itself
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(
        "pypar", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=3600)
    )
    connection.send_bytes(pickle.dumps((True, pickle.dumps("ready"))))
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        _forget_previous_test()
        answer: tuple[bool, bytes | str]
        try:
            answer = (True, pickle.dumps(_call(message)))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def _call(message: bytes) -> Any:
    path, module_name, function_name, args = pickle.loads(message)
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != path:
        specification = importlib.util.spec_from_file_location(module_name, path)
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[module_name] = module
        try:
            specification.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return getattr(module, function_name)(*pickle.loads(args))


def _forget_previous_test() -> None:
    """Destroy the process groups of the last test, which every rank has finished when any gets here."""
    import torch
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    torch.manual_seed(0)


def _report_collectives(path: Path, rank: int) -> None:
    """Make every Traffic of this process also write its latest call where the parent can read it."""
    from pypar.comm.traffic import Traffic

    with open(path, "r+b") as file:
        status = mmap.mmap(file.fileno(), 0)
    record, start = Traffic.record, rank * STATUS_BYTES

    def record_and_report(self: Traffic, collective: str, num_bytes: int) -> None:
        record(self, collective, num_bytes)
        text = f"{self.last} on axis {self.axis_name}".encode()[:STATUS_BYTES]
        status[start : start + STATUS_BYTES] = text.ljust(STATUS_BYTES, b"\0")

    Traffic.record = record_and_report  # type: ignore[method-assign]


def _print_to(path: Path) -> None:
    """Send standard output and error, those of native code too, to a file that the parent reads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115


def _die_with_parent(folder: str) -> None:
    """Leave no process and no file behind when pytest is interrupted or killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole foreground group; pytest ends us
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG; the process that forked us is the fork server
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
