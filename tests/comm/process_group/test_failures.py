"""The backend "pypar" when ranks disagree, are late, or die; and over several hosts."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

import pypar.comm  # noqa: F401 - makes the backend known, also in spawned processes
from tests.harness.forkserver import forkserver


def _group():
    return dist.new_group(backend="pypar")


def _mismatch(calls):
    group, rank = _group(), dist.get_rank()
    kind, count, dtype = calls[rank]
    x = torch.ones(count, dtype=getattr(torch, dtype))
    with pytest.raises(RuntimeError) as error:
        if kind == "broadcast":
            dist.broadcast(x, 0, group)
        else:
            dist.all_reduce(x, getattr(dist.ReduceOp, kind), group)
    with pytest.raises(RuntimeError, match="cannot be used any more"):
        dist.barrier(group)
    return str(error.value)


@pytest.mark.parametrize(
    ("calls", "sentence"),
    [
        ([("SUM", 8, "float32"), ("SUM", 9, "float32")], "all_reduce(32 bytes, float32, SUM).*(36 bytes"),
        ([("SUM", 8, "float32"), ("SUM", 8, "int32")], "float32, SUM).*int32, SUM)"),
        ([("SUM", 8, "float32"), ("MAX", 8, "float32")], "float32, SUM).*float32, MAX)"),
        ([("SUM", 8, "float32"), ("broadcast", 8, "float32")], "all_reduce(.*broadcast("),
    ],
)
def test_ranks_that_call_different_things_are_shown_both(ranks, calls, sentence):
    messages = ranks(2, _mismatch, calls)
    parts = sentence.split(".*")
    assert any(all(part in message for part in parts) for message in messages), messages
    assert all("number 1 of group" in message for message in messages)


def _late_pair():
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=0.5), backend="pypar")
    if dist.get_rank() == 1:
        time.sleep(1.5)
        return None
    with pytest.raises(RuntimeError) as error:
        dist.all_reduce(torch.ones(1), group=pair)
    with pytest.raises(RuntimeError) as message_error:
        dist.recv(torch.ones(1), 1, pair)
    return str(error.value), str(message_error.value)


def test_a_time_out_names_who_did_not_come(ranks):
    error, message_error = ranks(2, _late_pair)[0]
    assert re.search(r"all_reduce number 1 of group .*\(rank 0 of 2\): Timed out after 0\.5", error), error
    assert error.endswith("these ranks did not come: 1")
    assert "receive" in message_error or "message with rank 1" in message_error
    assert "Timed out after 0.5" in message_error


def _survive(rank, size, store_path, results):
    store = dist.FileStore(store_path, size)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=size)
    dist.barrier()
    if rank == size - 1:
        results.put((rank, time.monotonic(), "dies"))
        time.sleep(0.2)  # the queue's thread
        os.kill(os.getpid(), signal.SIGKILL)
    call = [lambda: dist.all_reduce(torch.ones(1)), lambda: dist.recv(torch.ones(1), size - 1)][rank]
    try:
        call()
    except RuntimeError as error:
        results.put((rank, time.monotonic(), str(error)))


def test_the_death_of_a_rank_is_noticed_within_a_second(tmp_path):
    """Not in a pool, which would kill the other ranks."""
    context = forkserver()
    results = context.Queue()
    arguments = (3, str(tmp_path / "store"), results)
    processes = [context.Process(target=_survive, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    reports = dict((rank, (at, text)) for rank, at, text in (results.get(timeout=60) for _ in processes))
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, -9]
    died_at, _ = reports.pop(2)
    for rank, (at, text) in reports.items():
        assert re.search(r"the process of rank (1, )?2 has ended", text), (rank, text)
        assert at - died_at < 0.2 + 1.0, f"rank {rank} noticed after {at - died_at - 0.2:.2f} s"


def _use_it():
    dist.all_reduce(torch.ones(1_000_000), group=_group())


def test_nothing_is_left_in_shared_memory(ranks):
    before = set(os.listdir("/dev/shm"))
    ranks(2, _use_it)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "pypar" in name} == set()


def _refusals():
    group = _group()
    with pytest.raises(ValueError, match="cannot reduce torch.int32 with AVG"):
        dist.all_reduce(torch.ones(1, dtype=torch.int32), dist.ReduceOp.AVG, group)
    with pytest.raises(ValueError, match="cannot reduce torch.float8_e4m3fn"):
        dist.all_reduce(torch.ones(1).to(torch.float8_e4m3fn), group=group)
    with pytest.raises(ValueError, match="dense CPU tensors"):
        dist.all_reduce(torch.ones(2, device="meta"), group=group)
    mesh = dist.device_mesh.DeviceMesh("cpu", list(range(dist.get_world_size())))
    with pytest.raises(ValueError, match="a DTensor of shape \\(2,\\) has no memory"):
        group.allreduce([distribute_tensor(torch.ones(2), mesh)])
    with pytest.raises(ValueError, match="must divide by the number of ranks"):
        dist.all_to_all_single(torch.ones(3), torch.ones(3), group=group)
    dist.barrier(group)  # refused before anything was sent: the group goes on


def test_refusals(ranks):
    ranks(2, _refusals)


def _over_hosts():
    """Ranks 0, 1 and 2 on two hosts each have some; the same results as on one host, apart from rounding."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ["PYPAR_HOST"] = "left" if rank < 2 else "right"
    try:
        group = _group()
    finally:
        del os.environ["PYPAR_HOST"]
    assert type(group).__name__ == "ProcessGroupBetweenHosts"
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    total = torch.stack(values).sum(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
        x = values[rank].to(dtype, copy=True)
        work = dist.all_reduce(x, group=group, async_op=True)
        work.wait()
        torch.testing.assert_close(x.double(), total.double(), rtol=tolerance, atol=10 * tolerance)
        dist.all_reduce(x := values[rank].to(dtype, copy=True), dist.ReduceOp.AVG, group)
        torch.testing.assert_close(x.double(), total.double() / size, rtol=tolerance, atol=10 * tolerance)
    for root in range(size):
        dist.broadcast(x := values[rank].clone(), root, group)
        assert torch.equal(x, values[root])
        dist.reduce(x := values[rank].clone(), root, group=group)
        assert rank != root or torch.allclose(x, total, atol=1e-5)
        outs = [torch.empty(1000) for _ in range(size)] if rank == root else None
        dist.gather(values[rank], outs, root, group)
        assert outs is None or all(map(torch.equal, outs, values))
        dist.scatter(x, values if rank == root else None, root, group)
        assert torch.equal(x, values[rank])
    outs = [torch.empty(1000) for _ in range(size)]
    dist.all_gather(outs, values[rank], group)
    assert all(map(torch.equal, outs, values))
    whole = torch.empty(size * 1000)
    dist.all_gather_into_tensor(whole, values[rank], group)
    assert torch.equal(whole, torch.cat(values))
    part = torch.empty(1000)
    dist.reduce_scatter_tensor(part, torch.cat([v + values[rank] for v in values]), group=group)
    torch.testing.assert_close(part, size * values[rank] + total, rtol=1e-5, atol=1e-5)
    dist.all_to_all_single(whole, torch.cat(values) * (rank + 1), group=group)
    assert torch.equal(whole, torch.cat([values[rank] * (r + 1) for r in range(size)]))
    receive = torch.empty(1000)
    operations = [
        dist.P2POp(dist.isend, values[rank], (rank + 1) % size, group),
        dist.P2POp(dist.irecv, receive, (rank - 1) % size, group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert torch.equal(receive, values[(rank - 1) % size])
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 1), process_group=group)
    model(values[rank][:10]).backward()
    mean = torch.stack(values).mean(0)[:10]
    torch.testing.assert_close(model.module.weight.grad[0], mean, rtol=1e-5, atol=1e-6)
    dist.barrier(group)


@pytest.mark.parametrize("size", [3, 4])
def test_several_hosts(ranks, size):
    ranks(size, _over_hosts)


def _three_hosts():
    """Numbers of many sizes, whose sum depends on the order; and outputs of all_gather that differ in size."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ["PYPAR_HOST"] = f"host {rank}"
    try:
        group = _group()
    finally:
        del os.environ["PYPAR_HOST"]
    exponents = torch.randint(-9, 9, (size, 1000), generator=torch.Generator().manual_seed(0))
    values = torch.randn(size, 1000, generator=torch.Generator().manual_seed(1)) * 2.0**exponents
    in_order = (values[0] + values[1]) + values[2]
    for pieces in (1, 7, 1000):
        for part, expected in zip(values[rank].chunk(pieces), in_order.chunk(pieces), strict=True):
            dist.all_reduce(x := part.clone(), group=group)
            assert torch.equal(x, expected)
    own = torch.empty(2)
    dist.reduce_scatter(own, list(values[rank][:6].split(2)), group=group)
    assert torch.equal(own, in_order[2 * rank : 2 * rank + 2])
    outs = [torch.empty(r) for r in range(size)]
    dist.all_gather(outs, torch.full((rank,), float(rank)), group)
    assert [out.tolist() for out in outs] == [[], [1.0], [2.0, 2.0]]
    with pytest.raises(ValueError, match="brings 8 bytes, and the output has 4 for it"):
        dist.all_gather([torch.empty(1) for _ in range(size)], torch.empty(2), group)
    with pytest.raises(ValueError, match="cannot reduce torch.int64 with AVG"):
        dist.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.AVG, group)


def test_between_hosts_sums_are_made_in_one_order(ranks):
    """Wherever in a tensor a number stands, so that gradients do not depend on the size of buckets."""
    ranks(3, _three_hosts)
