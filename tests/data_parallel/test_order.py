"""Buckets are filled anew in the ready order of the first rank; whoever holds a gradient sees the new place."""

import gc
import weakref

import pytest
import torch
from torch import nn

from pypar.data_parallel import GradientBuckets, reduction
from pypar.mesh import Axis, Mesh


def layers_in_an_unusual_order():
    """Backward reaches 1, 3, 0, 2: not the reverse of their numbers."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))


def backward(layers, rank, step, order=(2, 0, 3, 1)):
    generator = torch.Generator().manual_seed(10 * step + rank)
    hidden = torch.randn(3, 8, generator=generator)
    for i in order:
        hidden = layers[i](hidden).tanh()
    hidden.square().sum().backward()


def sent_buckets(run):
    """Parameters' numbers in each bucket, as the reductions start."""
    sent, start = [], reduction.FlatReduction.reduce_start

    def recorded(self, bucket, axis):
        sent.append([slot.name.removeprefix("parameter ") for slot in bucket.slots])
        return start(self, bucket, axis)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction.FlatReduction, "reduce_start", recorded)
        run()
    return ["".join(names) for names in sent]


def run_orders(rebuild, first_orders):
    """The buckets of two steps, where in the first step each rank has an order of its own."""
    axis = Mesh(dp=2).data
    layers = layers_in_an_unusual_order()
    made = GradientBuckets(
        layers.parameters(), axis, bucket_bytes=2 * 256, first_bucket_bytes=256, rebuild=rebuild
    )

    def step(number, order):
        made.zero()
        with made.accumulate():
            backward(layers, axis.rank, number, order[::-1])  # what accumulates says nothing of the last one
        backward(layers, axis.rank, number, order)
        made.finish()

    axis.traffic.reset()
    first = sent_buckets(lambda: step(0, first_orders[axis.rank]))
    calls = [axis.traffic.snapshot().calls]
    second = sent_buckets(lambda: step(1, (0, 1, 2, 3)))
    step(2, (3, 2, 1, 0))
    return first, second, sent_buckets(lambda: step(3, (2, 0, 3, 1))), calls, axis.traffic.snapshot().calls


def test_the_first_ranks_order_counts_on_all_ranks(ranks):
    for first, second, later, calls, all_calls in ranks(2, run_orders, True, [(2, 0, 3, 1), (0, 1, 2, 3)]):
        assert first == ["3", "21", "0"]
        assert second == later == ["1", "30", "2"]
        assert calls == [{"all_reduce": 3, "broadcast": 1}]
        assert all_calls["broadcast"] == 1  # once, not in every step


def test_without_rebuild_the_order_stays(ranks):
    for first, second, later, calls, _ in ranks(2, run_orders, False, [(2, 0, 3, 1), (0, 1, 2, 3)]):
        assert first == second == later == ["3", "21", "0"]
        assert calls == [{"all_reduce": 3}]


def run_unused():
    """What the first rank did not use comes last, in the order in which it stood: 3, then 0."""
    axis = Mesh(dp=2).data
    layers = layers_in_an_unusual_order()
    made = GradientBuckets(layers.parameters(), axis, bucket_bytes=1)
    backward(layers, axis.rank, 0, (2, 1) if axis.rank == 0 else (3, 2, 1, 0))
    made.finish()
    made.zero()

    def step():
        backward(layers, axis.rank, 1, (2, 1, 3))
        made.finish()

    return sent_buckets(step)


def test_what_was_not_used_comes_last(ranks):
    assert ranks(2, run_unused) == [["1", "2", "3", "0"]] * 2


def run_training(rebuild, way):
    """Weights after three steps of an optimizer that holds the gradients from before the first one."""
    axis = Mesh(dp=2).data
    layers = layers_in_an_unusual_order()
    if way == "masters":
        layers.bfloat16()
    made = GradientBuckets(
        layers.parameters(),
        axis,
        bucket_bytes=300,
        gradient_dtype=torch.float32 if way == "masters" else None,
        rebuild=rebuild,
    )
    held = [made.gradient(p) for p in layers.parameters()]
    old_buffer = weakref.ref(made._buckets[0].flat)
    if way == "masters":
        masters = [p.detach().float() for p in layers.parameters()]
        for master, gradient in zip(masters, held, strict=True):
            master.grad = gradient
    else:
        masters = list(layers.parameters())
    optimizer = torch.optim.AdamW(masters, lr=0.1)
    addresses = [x.data_ptr() for x in held]
    for step in range(3):
        made.zero()
        generator = torch.Generator().manual_seed(10 * step + axis.rank)
        hidden = torch.randn(3, 8, generator=generator).to(layers[0].weight.dtype)
        for i in (2, 0, 3, 1):
            hidden = layers[i](hidden).tanh()
        hidden.square().sum().backward()
        made.finish()
        optimizer.step()
        if way == "masters":
            for p, master in zip(layers.parameters(), masters, strict=True):
                p.data.copy_(master)
    gc.collect()
    same = all(a is made.gradient(p) for a, p in zip(held, layers.parameters(), strict=True))
    inside = all(any(_lies_in(x, b.flat) for b in made._buckets) for x in held)
    moved = [x.data_ptr() for x in held] != addresses
    return [m.detach().clone() for m in masters], same, inside, moved, old_buffer() is None


def _lies_in(x, flat):
    return x.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() and x._base is None


@pytest.mark.parametrize("way", ["views", "masters"])
def test_an_optimizer_that_holds_the_gradients_sees_them_move(ranks, way):
    """Same weights as without a rebuild, the same tensors, and the first buffers are freed."""
    kept = ranks(2, run_training, False, way)
    rebuilt = ranks(2, run_training, True, way)
    for (weights, *facts), (expected, *_) in zip(rebuilt, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        assert facts == [True, True, True, True], "same tensors, in the buckets, moved, old buffer freed"


def run_values_after_rebuild():
    axis = Mesh(dp=2).data
    layers = layers_in_an_unusual_order()
    made = GradientBuckets(layers.parameters(), axis, bucket_bytes=1)
    backward(layers, axis.rank, 0)
    made.finish()
    after = [p.grad.clone() for p in layers.parameters()]
    made.scale(2.0)
    doubled = [p.grad.clone() for p in layers.parameters()]
    made.zero()
    return after, doubled, all(not p.grad.any() for p in layers.parameters())


def test_the_step_of_the_rebuild_keeps_its_gradients(ranks):
    results = ranks(2, run_values_after_rebuild)
    layers = layers_in_an_unusual_order()
    for rank in range(2):
        backward(layers, rank, 0)  # adds up
    for after, doubled, is_zero in results:
        for x, twice, p in zip(after, doubled, layers.parameters(), strict=True):
            torch.testing.assert_close(x, p.grad, rtol=1e-6, atol=1e-6)
            assert torch.equal(twice, 2 * x)
        assert is_zero


def test_one_rank_rebuilds_nothing():
    layers = layers_in_an_unusual_order()
    made = GradientBuckets(layers.parameters(), Axis.single("data"), bucket_bytes=1)
    before = [made.gradient(p).data_ptr() for p in layers.parameters()]
    backward(layers, 0, 0)
    made.finish()
    assert [made.gradient(p).data_ptr() for p in layers.parameters()] == before
