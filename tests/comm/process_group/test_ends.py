"""The backend "pypar" when a process ends, is interrupted, or forks in the middle of things."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

import pypar.comm  # noqa: F401 - makes the backend known in spawned processes
from tests.harness.forkserver import forkserver


def _start(rank, size, store_path, results, what):
    dist.init_process_group("pypar", store=dist.FileStore(store_path, size), rank=rank, world_size=size)
    dist.barrier()
    what(rank, results)


def _run_processes(tmp_path, what, size=2):
    """Its own processes, which may end or be interrupted: (exit codes, seconds, what they put into `results`)."""
    context = forkserver()
    results = context.Queue()
    arguments = (size, str(tmp_path / "store"), results, what)
    processes = [context.Process(target=_start, args=(rank, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    reports = []
    while not results.empty():
        reports.append(results.get())
    return codes, reports


def _exit_with_unfinished_work(rank, results):
    """Rank 0 ends while collectives and messages that rank 1 never joins are under way."""
    if rank == 1:
        time.sleep(1.0)
        return
    x = torch.ones(1_000_000)
    for _ in range(3):
        dist.all_reduce(x, async_op=True).get_future()
    dist.isend(x, 1)
    dist.irecv(x, 1, tag=3).get_future()


def test_the_interpreter_ends_with_unfinished_work(tmp_path):
    started = time.monotonic()
    assert _run_processes(tmp_path, _exit_with_unfinished_work)[0] == [0, 0]
    assert time.monotonic() - started < 50


def _interrupted(rank, results):
    """A collective that was interrupted leaves its group unusable, so each has its own."""
    groups = [dist.new_group() for _ in range(2)]
    if rank == 1:
        time.sleep(4.0)
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    waits = {
        "message": lambda: dist.recv(torch.ones(1), 1),
        "background": lambda: dist.all_reduce(torch.ones(1), group=groups[0], async_op=True).wait(),
        "collective": lambda: dist.all_reduce(torch.ones(1), group=groups[1]),
    }
    for name, wait in waits.items():
        sent = []

        def send(sent=sent):
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.3, send)
        timer.start()
        try:
            wait()
        except KeyboardInterrupt:
            results.put((name, time.monotonic() - sent[0]))
        timer.join()


def test_an_interrupt_is_honoured_while_waiting(tmp_path):
    codes, reports = _run_processes(tmp_path, _interrupted)
    assert codes == [0, 0]
    delays = dict(reports)
    assert set(delays) == {"message", "background", "collective"}
    assert max(delays.values()) < 1.5, delays


class _Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index * index


def _fork_workers():
    group = dist.new_group(backend="pypar")
    dist.all_reduce(torch.ones(5), group=group)
    for _ in range(2):
        # The workers are forks of this rank, and end before it: nobody may take that for its end.
        loader = torch.utils.data.DataLoader(
            _Squares(), batch_size=10, num_workers=2, multiprocessing_context="fork"
        )
        assert sum(batch.sum().item() for batch in loader) == sum(i * i for i in range(40))
        if dist.get_rank() == 0:
            time.sleep(0.5)  # the others wait long enough to look whether this rank lives
        x = torch.ones(300_000)
        dist.all_reduce(x, group=group)
        assert (x == dist.get_world_size()).all()


def test_forks_of_a_rank_do_not_end_it(tmp_path):
    """Not in the pool: its ranks are daemons, which may not have children."""
    codes, reports = _run_processes(tmp_path, _fork_and_report)
    assert codes == [0, 0] and sorted(reports) == [0, 1]


def _fork_and_report(rank, results):
    _fork_workers()
    results.put(rank)


def _make_and_destroy():
    names = []
    for _ in range(
        2
    ):  # torch gives the second the name of the first, as the rank belongs to equally many groups
        group = dist.new_group([0, 1], use_local_synchronization=True)
        total = torch.ones(3)
        dist.all_reduce(total, group=group)
        names.append((group.group_name, total.tolist()))
        dist.destroy_process_group(group)
    return names


def test_a_group_may_have_the_name_of_one_that_was_destroyed(ranks):
    for first, second in ranks(2, _make_and_destroy):
        assert first == second and first[1] == [2.0] * 3
