"""Ranks on two hosts, which are network namespaces with a cable between them: backend "pypar" between hosts.

The long test has two ranks on each host.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import pypar.comm  # noqa: F401 - makes the backend known
from pypar.bench import namespaces
from pypar.data_parallel import GradientBuckets
from pypar.mesh import Axis
from tests import ROOT
from tests.harness.forkserver import forkserver

MEGABIT = 10**6
REASON = namespaces.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no network namespaces: {REASON}")


def _start(function, size, folder):
    """function(rank, size, folder) in processes of their own, which may go elsewhere."""
    forkserver()
    torch.multiprocessing.start_processes(
        function, (size, str(folder)), nprocs=size, start_method="forkserver"
    )


def _join(rank, size, folder, bits_per_second):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    namespaces.enter(store, rank, rank * 2 // size, bits_per_second)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=size)


def _sums(rank, size, folder):
    _join(rank, size, folder, 1000 * MEGABIT)
    assert type(dist.group.WORLD).__name__ == "ProcessGroupBetweenHosts"
    assert len(os.listdir("/sys/class/net")) >= 2
    x = torch.arange(1000.0) + rank
    dist.all_reduce(x)
    assert torch.equal(x, size * torch.arange(1000.0) + sum(range(size)))
    dist.broadcast(y := torch.full((3,), float(rank)), 1)
    assert y.tolist() == [1.0] * 3
    parameters = [torch.nn.Parameter(torch.zeros(300)) for _ in range(4)]
    buckets = GradientBuckets(parameters, Axis.of(dist.group.WORLD), bucket_bytes=1500, average=True)
    for _ in range(2):
        buckets.zero()
        sum(((rank + i) * p).sum() for i, p in enumerate(parameters)).backward()
        buckets.finish()
        for i, parameter in enumerate(parameters):
            assert parameter.grad.tolist() == [sum(r + i for r in range(size)) / size] * 300
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_backend_between_two_namespaces(tmp_path, size):
    _start(_sums, size, tmp_path)


def _is_slow(rank, size, folder):
    _join(rank, size, folder, 80 * MEGABIT)
    x = torch.zeros(
        1 << 20
    )  # 4 MiB, which each host sends: 0.42 s, less what the token bucket holds at first
    dist.all_reduce(x[:1000])
    started = time.perf_counter()
    dist.all_reduce(x)
    seconds = time.perf_counter() - started
    assert seconds > 0.37, seconds
    dist.barrier()
    os._exit(0)


def test_the_cable_has_the_speed_that_was_asked_for(tmp_path):
    _start(_is_slow, 2, tmp_path)


def _waits(rank, size, folder):
    _join(rank, size, folder, 1000 * MEGABIT)
    Path(folder, f"pid{rank}").write_text(f"{os.getpid()} {os.stat('/proc/self/ns/net').st_ino}")
    time.sleep(60)


def _devices():
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout.count("\n")


def test_nothing_is_left_when_the_parent_is_killed(tmp_path):
    before = _devices(), subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\nfrom tests.comm.process_group import test_network_namespaces as tests\n"
        "if __name__ == '__main__':\n"
        f"    arguments = (2, {str(tmp_path)!r})\n"
        "    torch.multiprocessing.start_processes(tests._waits, arguments, nprocs=2, start_method='fork')\n"
    )
    (tmp_path / "parent.py").write_text(program)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    try:
        deadline = time.monotonic() + 60
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        while not all(file.exists() and file.read_text() for file in files):
            assert parent.poll() is None and time.monotonic() < deadline, "the ranks did not come up"
            time.sleep(0.05)
        found = [tuple(map(int, file.read_text().split())) for file in files]
        assert len({namespace for _, namespace in found}) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid, _ in found):
        assert time.monotonic() < deadline, "ranks outlive their parent"
        time.sleep(0.05)
    after = _devices(), subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert before == after


def _is_running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
