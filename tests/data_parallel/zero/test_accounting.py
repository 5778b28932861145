"""What a store holds and sends is what the formulas of pypar.cost say, on every rank."""

import contextlib

import pytest
import torch

import pypar
from pypar.cost.memory import Parameter, Sharding, Units, peaks, states
from pypar.cost.volume import sent
from pypar.mesh import Mesh
from tests.data_parallel.zero.training import STAGES
from tests.data_parallel.zero.trees import HALF, WIDTH, Group, Leaf, Tree

# Odd rows, one row, none, no dims, two dtypes, frozen; the largest pair of neighbours is not the first one.
TREE = Tree(
    (
        Group((Leaf((7, WIDTH)), Leaf(()), Leaf((WIDTH,), is_trained=False))),
        Group((Leaf((3, 2, WIDTH)), Leaf((1, WIDTH), HALF), Leaf((0, WIDTH)))),
        Group((Leaf((19, WIDTH)), Leaf((WIDTH,)))),
        Group((Leaf((9, WIDTH), is_trained=False), Leaf((2, WIDTH), HALF))),
    ),
    before=Group((Leaf((5, WIDTH)),)),
    after=Group((Leaf((3, WIDTH)),)),
)
BLOCKS = [f"layers.{index}" for index in range(4)]
FORMS = STAGES | {
    "1 hybrid": {"stage": 1, "shard_size": 2},
    "3 hybrid": {"stage": 3, "shard_size": 2},
}


def units_of(model, dtype=None):
    def unit(module):
        return [
            Parameter(tuple(p.shape), (dtype or p.dtype).itemsize, p.requires_grad)
            for p in module.parameters()
        ]

    return Units([unit(layer) for layer in model.layers], unit(model.before), unit(model.after))


def run_account(form, dtype, num_microbatches):
    """What is held between steps and at most in one, the optimizer's moments, and the bytes that a step sends."""
    model, mesh = TREE.model(), Mesh(dp=torch.distributed.get_world_size())
    store = pypar.zero(model, mesh, blocks=BLOCKS, dtype=dtype, **FORMS[form])
    optimizer = torch.optim.Adam(store.parameters(), lr=0.01)
    for step in range(3):  # in the first one the order of blocks is learned
        store.reset_peak_memory()
        for axis in store.axes:
            axis.traffic.reset()
        for microbatch in range(num_microbatches):
            is_last = microbatch == num_microbatches - 1
            with contextlib.nullcontext() if is_last else store.accumulate():
                TREE.loss(model, mesh.data.rank, step, microbatch).backward()
        optimizer.step()
        store.publish()
        peak = dict(store.peak_memory())
        store.zero_grad()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    traffic = [axis.traffic.snapshot() for axis in store.axes]
    return dict(store.memory()), peak, sum(x.nbytes for x in moments), traffic


def predicted(form, dtype, rank, world_size):
    options = {key: value for key, value in FORMS[form].items()}
    return units_of(TREE.model(), dtype), Sharding(num_ranks=world_size, rank=rank, **options)


CASES = [
    (form, world_size, dtype, num_microbatches)
    for form in FORMS
    for world_size, dtype, num_microbatches in ((2, None, 2), (3, HALF, 1), (4, None, 1))
    if world_size == 4 or "hybrid" not in form
]


@pytest.mark.parametrize(("form", "world_size", "dtype", "num_microbatches"), CASES)
def test_memory_and_bytes_sent_are_those_of_the_formulas(ranks, form, world_size, dtype, num_microbatches):
    results = ranks(world_size, run_account, form, dtype, num_microbatches)
    for rank, (held, peak, moments, traffic) in enumerate(results):
        model, sharding = predicted(form, dtype, rank, world_size)
        expected = states(model, sharding)
        assert moments == expected.pop("moments")
        assert {name: held[name] for name in expected} == expected
        assert held["gathered"] == 0 and held["transient"] == 0
        most = peaks(model, sharding, num_backwards=num_microbatches)
        for name in ("parameters", "masters", "gradients", "gathered"):
            assert peak[name] == most[name], f"{name} of rank {rank}: {peak}, {most}"
        bytes_sent = sum(each.bytes_sent for each in traffic)
        num_calls = sum(sum(each.calls.values()) for each in traffic)
        total = sent(model, sharding, num_backwards=num_microbatches).total
        assert total - num_calls <= bytes_sent <= total, f"rank {rank}: {traffic}"
