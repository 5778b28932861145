"""Ranks that are threads of this process: the package's own code runs, only torch.distributed is replaced.

    def attend(axis, x):                 # runs in every rank; `axis` is a pypar Axis
        ...
    results = run_ranks(8, attend, x)    # by rank

A message is copied from the sender's tensor into the receiver's buffer once both have been posted, not before and
not at the wait: a sender that writes too early spoils what arrives, and a receiver that reads too early reads what
was there. A rank that fails makes the communication of the others fail, as when a process dies.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import Traffic, collectives
from pypar.mesh import Axis

TIMEOUT_S = 60.0


class _World:
    """What the ranks share. `changed` is its lock, and is notified when something is done or a rank fails."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: dict[tuple, _Message] = {}
        self.meetings: dict[tuple, _Meeting] = {}
        self.failed: set[int] = set()

    def fail(self, rank: int) -> None:
        with self.changed:
            self.failed.add(rank)
            self.changed.notify_all()


class _Message:
    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.buffer: Tensor | None = None
        self.done = False


class _Meeting:
    def __init__(self) -> None:
        self.posted: dict[int, tuple[str, Tensor, Tensor]] = {}
        self.done = False


class Work:
    """Done when `item` is; fails when it is not and one of `others` has failed."""

    def __init__(self, world: _World, item: _Message | _Meeting, others: Sequence[int], what: str) -> None:
        self._world, self._item, self._others, self._what = world, item, set(others), what

    def is_completed(self) -> bool:
        return self._item.done

    def wait(self) -> None:
        world = self._world
        with world.changed:
            if not world.changed.wait_for(lambda: self._item.done or world.failed & self._others, TIMEOUT_S):
                raise RuntimeError(f"{self._what} was not done within {TIMEOUT_S:.0f} s")
        if not self._item.done:
            raise RuntimeError(f"{self._what} will not be done: ranks {world.failed & self._others} failed")


class Group:
    """Some of the ranks, as one of them sees it; stands for a process group in an Axis."""

    def __init__(self, world: _World, ranks: Sequence[int], index: int) -> None:
        self.world, self.ranks, self.index = world, tuple(ranks), index
        self._counts: Counter[tuple] = Counter()

    def message(self, kind: str, tensor: Tensor, peer: int, tag: int) -> Work:
        me = self.ranks[self.index]
        route = (me, peer) if kind == "isend" else (peer, me)
        number = self._counts[(kind, route, tag)]
        self._counts[(kind, route, tag)] += 1
        with self.world.changed:
            item = self.world.messages.setdefault((self.ranks, route, tag, number), _Message())
            if kind == "isend":
                item.source = tensor
            else:
                item.buffer = tensor
            if item.source is not None and item.buffer is not None:
                sizes = (item.source.numel(), item.source.dtype), (item.buffer.numel(), item.buffer.dtype)
                assert sizes[0] == sizes[1], f"{route} sends {sizes[0]} where {sizes[1]} is expected"
                item.buffer.view(-1).copy_(item.source.view(-1))
                item.done = True
                self.world.changed.notify_all()
        return Work(self.world, item, (peer,), f"{kind} of rank {me} with rank {peer}")

    def meet(self, kind: str, output: Tensor, source: Tensor) -> Work:
        number = self._counts[("meeting",)]
        self._counts[("meeting",)] += 1
        with self.world.changed:
            meeting = self.world.meetings.setdefault((self.ranks, number), _Meeting())
            meeting.posted[self.index] = (kind, output, source)
            if len(meeting.posted) == len(self.ranks):
                kinds = {posted[0] for posted in meeting.posted.values()}
                assert len(kinds) == 1, f"ranks {self.ranks} started {sorted(kinds)} as their call {number}"
                _perform(kind, [meeting.posted[i] for i in range(len(self.ranks))])
                meeting.done = True
                self.world.changed.notify_all()
        return Work(self.world, meeting, self.ranks, f"{kind} of rank {self.ranks[self.index]}")


def _perform(kind: str, posted: list[tuple[str, Tensor, Tensor]]) -> None:
    sources = [source.clone().view(-1) for _, _, source in posted]
    for index, (_, output, _) in enumerate(posted):
        flat = output.view(-1)
        if kind == "all_gather":
            flat.copy_(torch.cat(sources))
        elif kind == "all_to_all":
            flat.copy_(torch.cat([source.chunk(len(posted))[index] for source in sources]))
        elif kind.startswith("all_reduce"):
            stacked = torch.stack(sources)
            flat.copy_(stacked.sum(0) if kind.endswith("SUM") else stacked.amax(0))
        elif kind == "reduce_scatter":
            flat.copy_(torch.stack([source.chunk(len(posted))[index] for source in sources]).sum(0))
        else:
            raise NotImplementedError(kind)


def axis_of(axis: Axis, indices: Sequence[int]) -> Axis:
    """An axis of some of the ranks of a simulated one; this rank is among them."""
    ranks = tuple(axis.ranks[index] for index in indices)
    if len(ranks) == 1:
        return Axis.single(axis.name)
    place = list(indices).index(axis.rank)
    return Axis(
        axis.name, Group(axis.group.world, ranks, place), place, len(ranks), ranks, Traffic(axis.name)
    )


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, outcomes: bool = False, name: str = "cp"
) -> list[Any]:
    """function(axis, *args) in each of `size` ranks; their results by rank. outcomes: exceptions are results too."""
    world = _World()
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def rank(index: int) -> None:
        torch.set_num_threads(1)
        ranks = tuple(range(size))
        group = Group(world, ranks, index) if size > 1 else None
        axis = Axis(name, group, index, size, ranks, Traffic(name))  # type: ignore[arg-type]
        try:
            results[index] = function(axis, *args)
        except BaseException as error:
            results[index] = error
            errors[index] = error
            world.fail(index)

    num_threads = torch.get_num_threads()
    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(size)]
    with _replaced():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT_S)
    torch.set_num_threads(num_threads)
    alive = [index for index, thread in enumerate(threads) if thread.is_alive()]
    assert not alive, f"ranks {alive} hang"
    if errors and not outcomes:
        raise next(iter(errors.values()))  # the first that failed
    return results


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """torch.distributed's functions, replaced for simulated groups only."""
    original = types.SimpleNamespace(op=dist.P2POp, batch=dist.batch_isend_irecv)

    def operation(op: Any, tensor: Tensor, peer: int, group: Any = None, tag: int = 0) -> Any:
        if not isinstance(group, Group):
            return original.op(op, tensor, peer, group, tag)
        return types.SimpleNamespace(kind=op.__name__, tensor=tensor, peer=peer, group=group, tag=tag)

    def batch(operations: list[Any]) -> list[Any]:
        if not isinstance(operations[0].group, Group):
            return original.batch(operations)
        return [item.group.message(item.kind, item.tensor, item.peer, item.tag) for item in operations]

    def meeting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: Tensor, source: Tensor, *rest: Any, group: Any = None, **options: Any) -> Any:
            if not isinstance(group, Group):
                return function(output, source, *rest, group=group, **options)
            assert not rest and options.pop("async_op", False) and not options, "equal parts, started"
            return group.meet(kind, output, source)

        return call

    def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not isinstance(group, Group):
            return all_reduce_of_torch(x, op=op, group=group, async_op=async_op)
        assert async_op and op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX)
        return group.meet(f"all_reduce {'SUM' if op == dist.ReduceOp.SUM else 'MAX'}", x, x)

    all_reduce_of_torch = dist.all_reduce
    with contextlib.ExitStack() as stack:
        for home, attribute, function in (
            (dist, "P2POp", operation),
            (dist, "batch_isend_irecv", batch),
            (dist, "all_to_all_single", meeting("all_to_all", dist.all_to_all_single)),
            (dist, "all_reduce", all_reduce),
            (collectives, "_all_gather", meeting("all_gather", collectives._all_gather)),
            (collectives, "_reduce_scatter", meeting("reduce_scatter", collectives._reduce_scatter)),
        ):
            stack.enter_context(mock.patch.object(home, attribute, function))
        yield
