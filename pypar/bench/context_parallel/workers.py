"""Processes that a bench gives orders to: the ranks, each with one thread on a core, and one that has all cores.

Between orders they sleep, so that whoever is measured has the machine.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import pypar.comm  # noqa: F401 - makes the backend known
from pypar.bench import namespaces
from pypar.mesh import Axis


class Workers:
    """size ranks of backend `backend`; with bits_per_second half of them on each of two hosts with such a cable.

    An order is a function of a module and its arguments; the function receives the axis first.
    """

    def __init__(self, size: int, backend: str = "pypar", bits_per_second: int | None = None) -> None:
        self.size, self.threads = size, min(size, os.cpu_count() or 1)
        self._folder = tempfile.TemporaryDirectory()
        self._context = torch.multiprocessing.get_context("spawn")
        self._ends: list[Any] = []
        store = str(Path(self._folder.name) / "store")
        self._ranks = [
            self._start(_rank, rank, size, store, backend, bits_per_second) for rank in range(size)
        ]
        self._single: Connection | None = None

    def ranks(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the ranks return, all at once."""
        for pipe in self._ranks:
            pipe.send((function, arguments))
        return [_answer(pipe) for pipe in self._ranks]

    def single(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What one process returns, whose axis has one rank and which has as many threads as the ranks together."""
        if self._single is None:
            # Unbound, two threads may share one core for seconds.
            os.environ["OMP_PROC_BIND"] = "true"
            self._single = self._start(_alone, self.threads)
            del os.environ["OMP_PROC_BIND"]
        self._single.send((function, arguments))
        return _answer(self._single)

    def close(self) -> None:
        for pipe in [*self._ranks, *([self._single] if self._single else [])]:
            pipe.send(None)
        for process in self._ends:
            process.join(20)
            process.kill()
        self._folder.cleanup()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, target: Callable[..., None], *arguments: Any) -> Connection:
        here, there = self._context.Pipe()
        process = self._context.Process(target=target, args=(there, *arguments), daemon=True)
        process.start()
        there.close()
        self._ends.append(process)
        return here


def _rank(
    pipe: Connection, rank: int, size: int, store_path: str, backend: str, bits_per_second: int | None
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[rank % len(cores)]])
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, size)
    if bits_per_second is not None:
        namespaces.enter(store, rank, host_of(rank, size), bits_per_second)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    _obey(pipe, Axis.of(dist.group.WORLD, "cp"))  # with one rank there is no group
    os._exit(0)


def host_of(rank: int, size: int) -> int:
    return rank * namespaces.NUM_HOSTS // size


def _alone(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    _obey(pipe, Axis.single("cp"))


def _obey(pipe: Connection, axis: Axis) -> None:
    while (order := pipe.recv()) is not None:
        function, arguments = order
        try:
            pipe.send((function(axis, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def _answer(pipe: Connection) -> Any:
    result, error = pipe.recv()
    if error is not None:
        raise RuntimeError(f"a process of the bench failed:\n{error}")
    return result
