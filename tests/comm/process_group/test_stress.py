"""The backend "pypar" under load: random calls, many groups, waits that time out, tensors over 2 GiB."""

import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def _value(rank: int, seed: int, count: int) -> torch.Tensor:
    """Whole numbers, so that every sum is exact."""
    return (torch.arange(count) * (seed % 7 + 1) + rank * 31 + seed) % 251 + 0.0


def _collective(kind: str, group: dist.ProcessGroup, members: list[int], seed: int, count: int):
    """(what was started, a check of its result)"""
    rank, size = dist.get_rank(group), len(members)
    mine, everyone = _value(rank, seed, count), [_value(r, seed, count) for r in range(size)]
    root = seed % size
    if kind == "all_reduce":
        work = dist.all_reduce(mine, group=group, async_op=True)
        return work, lambda: torch.equal(mine, sum(everyone))
    if kind == "broadcast":
        work = dist.broadcast(mine, members[root], group=group, async_op=True)
        return work, lambda: torch.equal(mine, everyone[root])
    if kind == "all_gather":
        out = torch.empty(size * count)
        work = dist.all_gather_into_tensor(out, mine, group=group, async_op=True)
        return work, lambda: torch.equal(out, torch.cat(everyone))
    if kind == "reduce_scatter":
        whole = [_value(r, seed, size * count) for r in range(size)]
        part = torch.empty(count)
        work = dist.reduce_scatter_tensor(part, whole[rank], group=group, async_op=True)
        return work, lambda: torch.equal(part, sum(whole)[rank * count : (rank + 1) * count])
    if kind == "all_to_all":
        out = torch.empty(size * count)
        work = dist.all_to_all_single(out, _value(rank, seed, size * count), group=group, async_op=True)
        return work, lambda: torch.equal(
            out, torch.cat([_value(r, seed, size * count)[rank * count :][:count] for r in range(size)])
        )
    received = torch.empty(count)  # messages around a ring
    following, previous = members[(rank + 1) % size], members[(rank - 1) % size]
    sending = dist.isend(mine, following, group, tag=seed % 5)
    receiving = dist.irecv(received, previous, group, tag=seed % 5)
    return _Both(sending, receiving), lambda: torch.equal(received, everyone[(rank - 1) % size])


class _Both:
    def __init__(self, *works: dist.Work) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _random_calls(seed: int, seconds: float) -> int:
    """All ranks draw the same plan; sleeps are each rank's own."""
    rank = dist.get_rank()
    plan, delays = random.Random(seed), random.Random(1000 * seed + rank)
    memberships = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [2, 3], [1, 2, 3]]
    groups = [dist.new_group(members, backend="pypar") for members in memberships]
    kinds = ["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "message"]
    pending: list = []
    calls, until = 0, time.monotonic() + seconds
    while True:
        go_on = torch.tensor([1.0 if time.monotonic() < until else 0.0])
        dist.broadcast(go_on, 0)
        if not go_on.item():
            break
        for _ in range(40):
            calls += 1
            index, kind = plan.randrange(len(groups)), plan.choice(kinds)
            count = plan.choice([0, 1, 7, 1000, 30_011, 300_007])
            waits_now, waits_for_all = plan.random() < 0.4, plan.random() < 0.1
            if rank not in memberships[index]:
                continue
            if delays.random() < 0.05:
                time.sleep(delays.random() * 0.01)
            started = _collective(kind, groups[index], memberships[index], calls, count)
            pending.append((kind, count, *started))
            if waits_now or waits_for_all:
                for kind_, count_, work, is_right in pending[-1:] if not waits_for_all else pending:
                    work.wait()
                    assert is_right(), (kind_, count_)
                pending = [] if waits_for_all else pending[:-1]
    for kind, count, work, is_right in pending:
        work.wait()
        assert is_right(), (kind, count)
    return calls


def test_random_calls(ranks):
    assert len(set(ranks(4, _random_calls, 1, 4.0))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_random_calls_for_long(ranks, seed):
    ranks(4, _random_calls, seed, 15.0, timeout_s=120)


def _resources() -> dict[str, int]:
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": len(Path("/proc/self/maps").read_text().split("memfd:pypar")) - 1,
        "python threads": threading.active_count(),
    }


def _more_than(before: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in _resources().items() if count > before[name]}


def _many_groups(count: int):
    def one():
        group = dist.new_group(backend="pypar")
        x = torch.ones(100_000)
        works = [dist.all_reduce(x, group=group, async_op=True) for _ in range(3)]
        works[-1].get_future().wait()
        received = torch.empty(3)
        other = 1 - dist.get_rank()
        for work in (dist.isend(x[:3], other, group), dist.irecv(received, other, group)):
            work.wait()
        dist.destroy_process_group(group)

    for _ in range(3):
        one()
    before = _resources()
    for _ in range(count):
        one()
    deadline = time.monotonic() + 5  # threads take a moment to end
    while (more := _more_than(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return more


def test_many_groups_leave_nothing_behind(ranks):
    assert ranks(2, _many_groups, 30) == [{}, {}]


def _time_out_of_a_wait():
    from datetime import timedelta

    group = dist.new_group(backend="pypar")
    if dist.get_rank() == 1:
        time.sleep(1.5)
        return None
    x = torch.ones(10)
    work = dist.all_reduce(x, group=group, async_op=True)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out after 0.3"):
        work.wait(timedelta(seconds=0.3))
    assert time.monotonic() - started < 1.2
    received = torch.zeros(1000)
    with pytest.raises(RuntimeError, match="Timed out after 0.2"):
        dist.irecv(received, 0, group, tag=1).wait(timedelta(seconds=0.2))
    dist.isend(torch.ones(1000), 0, group, tag=1)
    dist.irecv(torch.ones(1), 0, group, tag=2).is_completed()
    assert (received == 0).all()  # nothing writes to a tensor whose receive was given up
    return True


def test_the_time_out_of_a_wait(ranks):
    assert ranks(2, _time_out_of_a_wait)[0]


def _large(count):
    """Over 2 GiB; every value is checked by its sum in whole numbers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="pypar")
    x = torch.full((count,), rank + 1, dtype=torch.uint8)
    x[-3:] = 7
    dist.all_reduce(x, group=group)
    assert int(x[:-3].min()) == int(x[:-3].max()) == size * (size + 1) // 2
    assert x[-3:].tolist() == [7 * size] * 3
    x[-1] = 100 + rank
    dist.broadcast(x, 1, group)
    assert int(x[-1]) == 101
    if rank == 0:
        dist.send(x, 1, group)
    else:
        x.zero_()
        dist.recv(x, 0, group)
        assert int(x[-1]) == 101 and int(x[0]) == size * (size + 1) // 2
    del x
    whole = torch.empty(size, count // size + 1, dtype=torch.uint8)
    dist.all_gather_into_tensor(whole, torch.full_like(whole[0], rank + 1), group=group)
    for r in range(size):
        assert int(whole[r].min()) == int(whole[r].max()) == r + 1


@pytest.mark.slow
def test_tensors_over_2_gib(ranks):
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
    if available < 12 << 30:
        pytest.skip(f"12 GiB of memory are needed, {available / 2**30:.0f} are available")
    ranks(2, _large, 2**31 + 12_345, timeout_s=300)
