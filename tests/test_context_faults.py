"""A rank is killed in the middle of a ring: the others say so within seconds, and name the hop."""

import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import PRELOAD

from pypar.context_parallel import ring, ring_attention
from pypar.mesh import Axis

SIZE, VICTIM = 3, 1


def _rank(rank, folder, backend, direction):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", SIZE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    axis = Axis.of(dist.group.WORLD, "cp")
    q = torch.ones(1, 4, 2, 8).requires_grad_()
    original = getattr(ring, f"add_{direction}")

    def dying(*arguments):
        if rank == VICTIM:
            with open(f"{folder}/killed", "w") as file:
                file.write(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    ring_attention(q, q, q, axis, causal=False).sum().backward()  # all is well
    setattr(ring, f"add_{direction}", dying)
    try:
        ring_attention(q, q, q, axis, causal=False).sum().backward()
    except RuntimeError as error:
        with open(f"{folder}/error{rank}", "w") as file:
            file.write(f"{time.time()!r} {error}")
    os._exit(0)  # the group has lost a rank: it cannot be left in an orderly way


@pytest.mark.parametrize("backend,direction", [("gloo", "forward"), ("pypar", "backward")])
def test_a_killed_rank_is_noticed_and_the_hop_named(tmp_path, backend, direction):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_rank, args=(rank, str(tmp_path), backend, direction), daemon=True)
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    killed = float((tmp_path / "killed").read_text())
    told = {}
    for rank in (0, 2):
        at, error = (tmp_path / f"error{rank}").read_text().split(" ", 1)
        # Who needs nothing more of the dead rank in the forward notices in the backward.
        assert re.match(rf"ring attention, (forward|backward), hop [0-2] of 2 on rank {rank} of axis", error)
        assert float(at) - killed < 10
        told[rank] = direction in error.split(":")[0]
    assert told[2] if direction == "forward" else all(told.values())
