"""Several ranks of a PeerAllReduce in one process: a thread each while they meet, the devices of tests/harness/simt."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pypar.comm.allreduce import peers as allreduce
from pypar.comm.allreduce.cuda import CudaPeers
from pypar.comm.allreduce.peers import PeerAllReduce
from pypar.comm.allreduce.ranks import Ranks


class Board:
    """Where the threads meet."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.values: list[Any] = [None] * size
        self.own_calls = 0  # of the group's own all_reduce, by rank 0


class ThreadRanks(Ranks):
    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.size, self.token = board, rank, board.size, ""

    def gather(self, value: object) -> list[Any]:
        self.board.values[self.rank] = value
        self.board.barrier.wait()
        values = list(self.board.values)
        self.board.barrier.wait()
        return values

    def all_reduce(self, x: Tensor) -> None:
        self.board.own_calls += self.rank == 0
        x.copy_(sum(self.gather(x.clone())))


class Recorded:
    """A module whose calls are recorded by name, and some replaced: function(original, *arguments)."""

    def __init__(self, module: ModuleType, **replaced: Callable[..., Any]) -> None:
        self.module, self.replaced, self.calls = module, replaced, []

    def __getattr__(self, name: str) -> Any:
        original = getattr(self.module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            if name in self.replaced:
                return self.replaced[name](original, *arguments)
            return original(*arguments, **options)

        return call

    def order(self, *names: str) -> list[str]:
        return [name for name in self.calls if name in names]


def in_threads(size: int, work: Callable[[int], Any]) -> list[Any]:
    """work(rank) in a thread for each rank; results, or exceptions, by rank."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


class SynchronousPeers(CudaPeers):
    """A call returns when it has run on all ranks, as CPU tensors are used next by code that knows no streams."""

    one_at_a_time = threading.Lock()  # launches leave the GIL, and the host runtime is one thread's

    def all_reduce(self, x: Tensor, y: Tensor, two_shot: bool) -> None:
        with self.one_at_a_time:
            super().all_reduce(x, y, two_shot)
        self._run()

    def residual_norm(self, tensors: dict[str, Tensor], eps: float, two_shot: bool) -> None:
        with self.one_at_a_time:
            super().residual_norm(tensors, eps, two_shot)
        self._run()

    def _run(self) -> None:
        self._ranks.gather(None)
        if self._ranks.rank == 0:
            self._module.synchronize(self._stream())
        self._ranks.gather(None)


def engine(
    module: Any, streams: list[int], kind: type[CudaPeers], refusal: Callable[[], Any]
) -> SimpleNamespace:
    """An entry of ENGINES: the kernels under the host runtime."""

    def connect(ranks: Ranks, device: torch.device, max_bytes: int, timeout_ms: int) -> CudaPeers:
        stream = streams[ranks.rank]
        return kind(module, ranks, 0, max_bytes, timeout_ms, lambda: stream)

    return SimpleNamespace(NAME="cuda", unsupported=lambda device: refusal(), connect=connect)


def this_rank() -> int:
    return int(threading.current_thread().name.removeprefix("rank "))


class PeerGroup:
    """peers: by rank; where making one raised, the exception instead."""

    def __init__(self, module: Any, streams: list[int], board: Board, peers: list[Any]) -> None:
        self.module, self.streams, self.board, self.peers = module, streams, board, peers

    def call(self, work: Callable[[PeerAllReduce, int], Any]) -> list[Any]:
        """work(peer, rank) of all ranks at once."""
        results = in_threads(len(self.peers), lambda rank: work(self.peers[rank], rank))
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def synchronize(self) -> None:
        self.module.synchronize(self.streams[0])


@contextmanager
def peer_group(
    monkeypatch: Any,
    module: Any,
    size: int,
    *,
    kind: type[CudaPeers] = SynchronousPeers,
    refusal: Callable[[], str | None] = lambda: None,
    **options: Any,
) -> Iterator[PeerGroup]:
    """Peers of `size` ranks on the host runtime's devices. options: of PeerAllReduce; a list has one for each rank."""
    module.set_options(concurrent=True, seed=size, block_order="random", thread_order="random")
    streams, board = [module.create_stream() for _ in range(size)], Board(size)
    monkeypatch.setattr(allreduce, "ENGINES", {"cuda": engine(module, streams, kind, refusal)})
    options = {"device": "cpu", "max_bytes": 1 << 14, **options}

    def make(rank: int) -> PeerAllReduce:
        mine = {name: value[rank] if isinstance(value, list) else value for name, value in options.items()}
        return PeerAllReduce(ThreadRanks(board, rank), **mine)

    group = PeerGroup(module, streams, board, in_threads(size, make))
    try:
        yield group
    finally:
        made = [peer for peer in group.peers if isinstance(peer, PeerAllReduce)]
        if len(made) == size:
            in_threads(size, lambda rank: made[rank].close())
        for stream in streams:
            module.destroy_stream(stream)
        module.set_options()
