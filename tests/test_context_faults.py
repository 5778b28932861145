"""A rank of a ring is killed or fails: the others say so within seconds, and name the hop."""

import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from context_cases import Case, inputs
from ranks import PRELOAD
from simulated_ranks import run_ranks

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


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_that_fails_is_told_with_the_hop(monkeypatch, direction):
    name = f"add_{direction}"
    original = getattr(ring, name)

    def failing(*arguments):
        if arguments[-1].axis.rank == 2:
            raise SystemError("this rank is gone")
        original(*arguments)

    def attend(axis):
        given = inputs(Case(T=4), torch.float32)
        q = given["q"].requires_grad_()
        ring_attention(q, given["k"], given["v"], axis, causal=False).sum().backward()

    monkeypatch.setattr(ring, name, failing)
    outcomes = run_ranks(4, attend, outcomes=True)
    assert isinstance(outcomes[2], SystemError)
    # Its neighbours miss it where they need what it had to do in hop 1 or 3, the rank opposite when these are gone.
    hops = {3: 2, 1: 2, 0: 3} if direction == "forward" else {1: 2, 3: 1, 0: 1}
    for rank, hop in hops.items():
        assert isinstance(outcomes[rank], RuntimeError)
        assert str(outcomes[rank]).startswith(
            f"ring attention, {direction}, hop {hop} of 3 on rank {rank} of axis 'cp': "
        )
