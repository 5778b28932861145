"""A rank of a ring is killed or fails, or differs from the others: they say so within seconds, or go on."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pypar import shard_context
from pypar.context_parallel import ring_attention, shard, unshard
from pypar.context_parallel.methods.ring import method as ring
from pypar.mesh import Axis
from pypar.ops.attention import attention
from tests.context_parallel.cases import Case, inputs
from tests.harness.forkserver import forkserver
from tests.harness.simulated_ranks import run_ranks

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
    context = forkserver()
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


# ---- ranks that make different calls, in processes of their own


def _q(T=4, N=2, H=8, dtype=torch.float32):
    return torch.ones(1, T, N, H, dtype=dtype)


# What one rank of three passes otherwise than the others, to ring_attention and in the model, and what is said of it.
DIFFERENT = {
    "heads": (lambda odd: (_q(N=4 if odd else 2), {}), r"q must be the same .* has \[1, T, 4, 8\]"),
    "head size": (lambda odd: (_q(H=16 if odd else 8), {}), r"q must be the same .* has \[1, T, 2, 16\]"),
    "batch": (
        lambda odd: (_q().expand(2 if odd else 1, -1, -1, -1), {}),
        r"q must be the same .* has \[2, T, 2, 8\]",
    ),
    "positions": (
        lambda odd: (_q(T=5 if odd else 4), {}),
        "length_q .*must be the same .* rank 0 has 12 and rank 1 has 15",
    ),
    "dtype": (
        lambda odd: (_q(dtype=torch.float64 if odd else torch.float32), {}),
        r"q must be the same .* rank 1 has .* torch.float64",
    ),
    "causal": (lambda odd: (_q(), {"causal": odd}), "(causal|window).* must be the same"),
    "scale": (
        lambda odd: (_q(), {"scale": 0.5 if odd else 0.25}),
        "scale must be the same .* rank 0 has 0.25 and rank 1 has 0.5",
    ),
}


def _attempts(backend, in_model):
    """Of each different call: the error, its seconds, and the communication that was started. Then of an equal one."""
    axis = Axis.of(dist.new_group(backend=backend), "cp")
    told = {}
    for name, (call, _) in DIFFERENT.items():
        q, options = call(axis.rank == 1)
        axis.traffic.reset()
        began = time.monotonic()
        try:
            _attend(axis, q, options, in_model)
        except ValueError as error:
            told[name] = (str(error), time.monotonic() - began, dict(axis.traffic.calls))
    return told, _attend(axis, _q(), {}, in_model).sum().item()


def _attend(axis, q, options, in_model):
    if not in_model:
        return ring_attention(q, q, q, axis, **{"causal": False, **options})
    heads_first = q.transpose(1, 2)
    options = {{"causal": "is_causal"}.get(name, name): value for name, value in options.items()}
    with shard_context(axis):
        return F.scaled_dot_product_attention(heads_first, heads_first, heads_first, **options)


@pytest.mark.parametrize(("backend", "in_model"), [("pypar", False), ("gloo", True)])
def test_calls_that_differ_raise_on_all_ranks_before_data_moves(ranks, backend, in_model):
    for told, total in ranks(3, _attempts, backend, in_model):
        assert total == _q().numel()
        for name, (_, sentence) in DIFFERENT.items():
            error, seconds, calls = told[name]
            assert re.search(sentence, error), (name, error)
            assert seconds < 5
            assert set(calls) == {"all_gather"} and calls["all_gather"] <= 2, (name, calls)  # of the question


def _hybrid_after_groups(backend, own):
    """own: groups that ranks are in beside, so that ranks 0 and 3 belong to more than the others."""
    group = dist.new_group(backend=backend)
    for ranks in own:
        dist.new_group(ranks, backend=backend)
    whole = [torch.randn(1, 16, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2)]
    parts = [shard(x, 1, group, "zigzag") for x in whole]
    options = {"method": "hybrid", "method_options": {"ulysses_size": 2}}
    outs, groups = [], []
    for _ in range(2):  # a group, not an axis, which would be another one at each call
        outs.append(unshard(ring_attention(*parts, group, causal=True, **options), 1, group, "zigzag"))
        groups.append(len(dist.distributed_c10d._world.pg_names))
    assert torch.equal(*outs) and groups[0] == groups[1]
    return outs[0], groups[0]


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_hybrid_makes_its_groups_where_ranks_belong_to_different_numbers_of_groups(ranks, backend):
    q, k, v = (torch.randn(1, 16, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    results = ranks(4, _hybrid_after_groups, backend, [[0, 3], [0, 3], [3]])
    for out, _ in results:
        torch.testing.assert_close(out, attention(q, k, v, causal=True), rtol=1e-5, atol=1e-5)
    assert len({count for _, count in results}) == 1
