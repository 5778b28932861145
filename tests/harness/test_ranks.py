"""The pool of ranks that other tests run in: it fails a broken test with a useful message, leaves nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pypar.comm import all_reduce_start
from pypar.mesh import Axis, Mesh
from tests import ROOT
from tests.harness.ranks import RankError


def _sum_of_ranks(scale):
    x = torch.tensor([float(dist.get_rank() * scale)])
    return all_reduce_start(x, Axis.of(dist.group.WORLD)).wait()


def _threads_and_process():
    return torch.get_num_threads(), os.getpid()


def _raise_in_rank(bad_rank):
    if dist.get_rank() == bad_rank:
        raise KeyError("the reason")
    all_reduce_start(torch.ones(1), Axis.of(dist.group.WORLD)).wait()


def _leave_out_rank(missing_rank):
    axis = Axis.of(dist.group.WORLD, "world")
    all_reduce_start(torch.ones(5), axis).wait()
    if dist.get_rank() != missing_rank:
        all_reduce_start(torch.ones(7), axis).wait()


def _die(bad_rank):
    print("about to die")
    if dist.get_rank() == bad_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _num_groups():
    Mesh(tp=2)
    return len(dist.distributed_c10d._world.pg_map)


def _hang():
    time.sleep(1000)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(ranks, world_size):
    total = 3.0 * sum(range(world_size))
    assert [x.tolist() for x in ranks(world_size, _sum_of_ranks, 3)] == [[total]] * world_size


def test_pool_lives_on_with_one_thread_a_rank(ranks):
    first, second = ranks(2, _threads_and_process), ranks(2, _threads_and_process)
    assert first == second
    assert [threads for threads, _ in first] == [1, 1]
    assert [process for _, process in first] == ranks.process_ids(2)
    assert os.getpid() not in ranks.process_ids(2)


def test_groups_of_a_test_do_not_pile_up(ranks):
    assert ranks(2, _num_groups) == ranks(2, _num_groups)


def test_exception_is_shown_with_its_rank(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 raised in _raise_in_rank.*KeyError: 'the reason'"):
        ranks(2, _raise_in_rank, 1)
    assert ranks(2, _sum_of_ranks, 1)[0].tolist() == [1.0]


def test_watchdog_names_the_last_collective_of_each_rank(ranks):
    with pytest.raises(RankError) as error:
        ranks(2, _leave_out_rank, 0, timeout_s=2.5)
    text = str(error.value)
    assert "_leave_out_rank did not finish in 2.5 s; ranks [0] have finished" in text
    assert "rank 0: last all_reduce (call 1, 20 bytes to send) on axis world" in text
    assert "rank 1: last all_reduce (call 2, 28 bytes to send) on axis world" in text
    assert "stack of rank 1" in text and "in _leave_out_rank" in text
    assert ranks(2, _sum_of_ranks, 1)[0].tolist() == [1.0]


def test_death_of_a_rank_is_named(ranks, capsys):
    with pytest.raises(RankError, match="rank 1 died in _die, exit code -9"):
        ranks(2, _die, 1)
    assert "[rank 1] about to die" in capsys.readouterr().out


def test_local_function_is_refused(ranks):
    with pytest.raises(ValueError, match="must be a module-level function"):
        ranks(1, lambda: None)


_SESSION = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {root!r})
from tests.harness import forkserver, ranks, test_ranks

forkserver.PRELOAD = ["pypar.comm"]  # what its ranks want

def test_hang(tmp_path):
    pools = ranks.RankPools(tmp_path)
    try:
        identities = [process for _, process in pools(2, test_ranks._threads_and_process)]
        folder = pools._pools[2].folder
        pathlib.Path({note!r}).write_text(" ".join(map(str, [folder, *identities])))
        pools(2, test_ranks._hang)
    finally:
        pools.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_session_leaves_nothing(tmp_path, end):
    note = tmp_path / "note"
    session = tmp_path / "test_session.py"
    session.write_text(_SESSION.format(root=str(ROOT), note=str(note)))
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, str(session)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _wait_for(lambda: note.exists() and len(note.read_text().split()) == 3 or process.poll() is not None, 60)
    assert process.poll() is None, process.communicate()[0].decode()
    folder, *identities = note.read_text().split()
    maps = "".join(Path(f"/proc/{identity}/maps").read_text() for identity in identities)
    shared_memory = {line.split()[-1] for line in maps.splitlines() if "/dev/shm/" in line}
    time.sleep(0.2)
    process.send_signal(end)
    process.communicate(timeout=30)
    _wait_for(lambda: not any(_is_alive(int(identity)) for identity in identities), 10)
    _wait_for(lambda: not os.path.exists(folder), 5)
    assert not any(os.path.exists(path) for path in shared_memory)


def _is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
