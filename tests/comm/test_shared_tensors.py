"""Tensors in memory that all ranks of a group share: an all_reduce of them copies nothing and gives the same bits."""

import gc
import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pypar
from pypar.comm import shared_empty
from pypar.mesh import Axis
from tests.harness.forkserver import forkserver

SUM, AVG, MAX = dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX
# More than the 256 KiB up to which everybody reads everything; no multiples of a cache line, a rank or a block.
CASES = [
    (torch.float32, 65537, SUM),
    (torch.float32, 1_000_003, AVG),
    (torch.bfloat16, 777_777, SUM),
    (torch.float16, 200_001, AVG),
    (torch.float64, 99_991, SUM),
    (torch.int16, 400_009, SUM),
    (torch.uint8, 300_007, MAX),
    (torch.float32, 1001, SUM),  # small: copied
]


def _axis():
    return Axis.of(dist.new_group(backend="pypar"))


def _values(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).mul(100).to(dtype)
    return torch.randint(0, 100, (count,), generator=generator).to(dtype)


def _same_bits():
    axis, wrong, in_place = _axis(), [], []
    for seed, (dtype, count, op) in enumerate(CASES):
        shared, own = shared_empty(count, dtype, axis), _values(count, dtype, seed)
        shared.copy_(own)
        before = axis.group.native.num_in_place
        dist.all_reduce(shared, op, axis.group)
        dist.all_reduce(own, op, axis.group)
        in_place.append(axis.group.native.num_in_place - before)
        if not torch.equal(shared.view(torch.uint8), own.view(torch.uint8)):
            wrong.append((dtype, count, op))
    return wrong, in_place


@pytest.mark.parametrize("size", [2, 4])
def test_the_bits_are_those_of_the_copying_path(ranks, size):
    for wrong, in_place in ranks(size, _same_bits):
        assert wrong == []
        assert in_place == [1] * 7 + [0]


def _alike():
    """Some ranks' tensors are not shared, or lie elsewhere: all ranks copy."""
    axis, rank, count = _axis(), dist.get_rank(), 700_001
    memory, other = (shared_empty(2 * count, torch.float32, axis) for _ in range(2))
    own = _values(count, torch.float32, 5)
    expected = own.clone()
    dist.all_reduce(expected, group=axis.group)
    places = {
        "same part": memory[16 : 16 + count],
        "one is not shared": memory[:count] if rank else torch.empty(count),
        "all but one are not shared": torch.empty(count) if rank else memory[:count],
        "other offset": memory[rank : rank + count],
        "other memory": (other if rank == 1 else memory)[:count],
        "back in place": other[count:],
    }
    found = {}
    for name, place in places.items():
        before = axis.group.native.num_in_place
        place.copy_(own)
        work = dist.all_reduce(place, group=axis.group, async_op=True)
        work.wait()
        found[name] = (torch.equal(place, expected), axis.group.native.num_in_place - before)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_decide_alike(ranks, size):
    for found in ranks(size, _alike):
        assert all(right for right, _ in found.values()), found
        assert {name for name, (_, in_place) in found.items() if in_place} == {"same part", "back in place"}


def _in_use():
    with open("/proc/self/maps") as maps:
        return sum("memfd:pypar" in line for line in maps), len(os.listdir("/proc/self/fd"))


def _allocate_and_free():
    axis = _axis()
    dist.barrier(axis.group)
    gc.collect()
    before = _in_use()
    for i in range(200):
        x = shared_empty(100_000 + i, torch.float32, axis).fill_(1.0)
        if i % 50 == 0:
            dist.all_reduce(x, group=axis.group)
            assert x.unique().tolist() == [2.0]
        part = x[5:]
        del x
    assert _in_use()[0] == before[0] + 1  # a view keeps it
    del part
    return before, _in_use()


def test_memory_is_freed_with_the_last_tensor(ranks):
    for before, after in ranks(2, _allocate_and_free):
        assert after == before


def _fork():
    axis = _axis()
    x = shared_empty(100_000, torch.float32, axis).fill_(1.0)
    child = os.fork()
    if child == 0:
        del x
        os._exit(0)
    _, status = os.waitpid(child, 0)
    dist.all_reduce(x, group=axis.group)
    return status, x.unique().tolist()


def test_a_forked_child_that_ends_takes_nothing_along(ranks):
    assert ranks(2, _fork) == [(0, [2.0])] * 2


def _other_sizes():
    with pytest.raises(RuntimeError) as error:
        shared_empty(10_000 * (1 + dist.get_rank()), torch.float32, _axis())
    return str(error.value)


def test_other_sizes_are_refused_on_all_ranks(ranks):
    for message in ranks(2, _other_sizes):
        assert re.search(r"rank 1 asks for 81920 bytes of shared memory .* rank 0 for 40960", message)


def _ordinary():
    gloo = Axis.of(dist.new_group(backend="gloo"))
    tensors = shared_empty(7, torch.int64, gloo), shared_empty(0, torch.float32, _axis())
    return [(x.shape, x.dtype) for x in tensors], _in_use()[0]


def test_elsewhere_it_is_an_ordinary_tensor(ranks):
    for tensors, _ in ranks(2, _ordinary):
        assert tensors == [((7,), torch.int64), ((0,), torch.float32)]
    assert shared_empty(3, torch.float16, Axis.single("data")).shape == (3,)


def _buckets(comm_dtype):
    axis = _axis()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
    model = pypar.DataParallel(model, axis, comm_dtype=comm_dtype)
    for _ in range(2):  # before and after buckets are made anew
        model(torch.ones(2, 400)).sum().backward()
    return axis.group.native.num_in_place


@pytest.mark.parametrize("comm_dtype", [None, torch.bfloat16])
def test_buckets_are_shared(ranks, comm_dtype):
    assert ranks(2, _buckets, comm_dtype) == [2, 2]


def _survive(rank, store_path, results):
    dist.init_process_group("pypar", store=dist.FileStore(store_path, 2), rank=rank, world_size=2)
    x = shared_empty(1_000_000, torch.float32, Axis.of(dist.group.WORLD)).fill_(1.0)
    dist.all_reduce(x)
    if rank == 1:
        results.put((rank, time.monotonic(), "dies"))
        time.sleep(0.2)  # the queue's thread
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(x)
    except RuntimeError as error:
        results.put((rank, time.monotonic(), str(error)))


def test_the_death_of_a_rank_is_noticed(tmp_path):
    context = forkserver()
    results = context.Queue()
    arguments = (str(tmp_path / "store"), results)
    processes = [context.Process(target=_survive, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    reports = {rank: (at, text) for rank, at, text in (results.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, -9]
    assert "the process of rank 1 has ended" in reports[0][1]
    assert reports[0][0] - reports[1][0] < 0.2 + 1.0
