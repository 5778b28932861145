"""Gradients that come in unusual ways: no hook, no backward, sparse, frozen, and those that do not come."""

import pytest
import torch
from torch import nn

from pypar.data_parallel import GradientBuckets, reduction
from pypar.mesh import Axis, Mesh

SINGLE = Axis.single("data")


def make_layers():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(6, 6) for _ in range(3))


def batch(rank, microbatch):
    generator = torch.Generator().manual_seed(10 * microbatch + rank)
    return torch.randn(4, 6, generator=generator)


def forward(layers, x):
    for layer in layers:
        x = layer(x).tanh()
    return x.square().sum()


def whole_backward(layers, made, rank, num_microbatches):
    with made.accumulate():
        for microbatch in range(num_microbatches - 1):
            forward(layers, batch(rank, microbatch)).backward()
    forward(layers, batch(rank, num_microbatches - 1)).backward()


def split_backward(layers, made, rank, num_microbatches, way):
    """As a zero-bubble schedule does: inputs' gradients of all microbatches first, weights' gradients later."""
    losses = [forward(layers, batch(rank, m)) for m in range(num_microbatches)]
    for microbatch, loss in enumerate(losses):
        parameters = list(layers.parameters())
        found = torch.autograd.grad(loss, parameters)  # runs no hooks
        is_last = microbatch == num_microbatches - 1
        for p, gradient in zip(parameters, found, strict=True):
            if p.grad is None:
                p.grad = gradient
            elif way == "new tensors":
                p.grad = p.grad + gradient
            else:
                p.grad += gradient
        if way == "announced one by one":
            for p in reversed(parameters):
                if is_last:
                    made.arrived(p)
        elif way == "announced":
            if is_last:
                made.arrived(*parameters)
            else:
                with made.accumulate():
                    made.arrived(*parameters)


def run_split(world_size, way, dtype):
    axis = Mesh(dp=world_size).data if world_size > 1 else SINGLE
    results, early = [], []
    for backward in (whole_backward, split_backward):
        layers = make_layers()
        made = GradientBuckets(layers.parameters(), axis, bucket_bytes=1, gradient_dtype=dtype)
        for _ in range(2):
            made.zero()
            backward(layers, made, axis.rank, 3, *([way] if backward is split_backward else []))
            early.append(made._next)
            made.finish()
        results.append([made.gradient(p).clone() for p in layers.parameters()])
    return results, early, made.num_buckets


@pytest.mark.parametrize("way", ["announced", "announced one by one", "in place", "new tensors"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_written_without_a_hook_are_reduced(ranks, world_size, way):
    for (whole, split), early, num_buckets in ranks(world_size, run_split, world_size, way, None):
        assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))
        started = num_buckets if way.startswith("announced") else 0
        assert early == [num_buckets, num_buckets, started, started]  # buckets under way before finish()


@pytest.mark.parametrize("way", ["announced", "new tensors"])
def test_gradients_written_without_a_hook_in_a_dtype_of_their_own(ranks, way):
    for (whole, split), *_ in ranks(2, run_split, 2, way, torch.float64):
        # Hooks add each microbatch in fp64, these add them in fp32 first.
        for a, b in zip(whole, split, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert b.any()


def test_announcing_wrongly_is_an_error():
    layers = make_layers()
    made = GradientBuckets(layers.parameters(), SINGLE)
    forward(layers, batch(0, 0)).backward()
    with pytest.raises(RuntimeError, match="again after its gradient was handed to communication"):
        made.arrived(layers[0].weight)
    with pytest.raises(ValueError, match="not among the parameters"):
        made.arrived(nn.Parameter(torch.ones(2)))
    made.finish()
    layers[0].weight.grad += 1
    with pytest.raises(RuntimeError, match=r"call buckets.zero\(\) before"):
        made.arrived(layers[0].weight)
    with pytest.raises(RuntimeError, match=r"still holds the sum of the last finish"):
        made.finish()


def test_an_announced_gradient_that_is_not_there_counts_as_zero():
    layers = make_layers()
    made = GradientBuckets(layers.parameters(), SINGLE)
    forward(layers, batch(0, 0)).backward()
    made.finish()
    for p in layers.parameters():
        p.grad = None
    made.arrived(*layers.parameters())
    made.finish()
    assert all(p.grad is made.gradient(p) and not p.grad.any() for p in layers.parameters())


# ---- frozen, unfrozen, different on every rank


def run_frozen(when):
    """Three steps: the first layer is trained, frozen, trained again. Which buckets start before finish()."""
    axis = Mesh(dp=2).data
    layers = make_layers()
    made = GradientBuckets(layers.parameters(), axis, bucket_bytes=1, rebuild=False)
    found, early = [], []
    for step in range(3):
        if when == "before zero":
            layers[1].requires_grad_(step != 1)
        made.zero()
        if when == "after zero":
            layers[1].requires_grad_(step != 1)
        elif when == "on one rank":
            layers[1].requires_grad_(step != 1 or axis.rank == 0)
        forward(layers, batch(axis.rank, step)).backward()
        early.append(made._next)
        made.finish()
        found.append([p.grad.clone() for p in layers.parameters()])
    return found, early, made.num_buckets


@pytest.mark.parametrize("when", ["before zero", "after zero", "on one rank"])
def test_frozen_parameters_count_as_zero_and_hold_up_nothing(ranks, when):
    results = ranks(2, run_frozen, when)
    for found, early, num_buckets in results:
        assert early == [num_buckets] * 3
        for step, gradients in enumerate(found):
            layers, expected = make_layers(), []
            for rank in range(2):
                layers.zero_grad()
                layers[1].requires_grad_(step != 1 or (when == "on one rank" and rank == 0))
                forward(layers, batch(rank, step)).backward()
                expected.append(
                    [torch.zeros_like(p) if p.grad is None else p.grad for p in layers.parameters()]
                )
            for gradient, *parts in zip(gradients, *expected, strict=True):
                assert torch.equal(gradient, sum(parts))


def test_a_frozen_parameter_that_is_announced_counts_once():
    """The bucket waits for the last of the others."""
    frozen, first, last = (nn.Parameter(torch.ones(2)) for _ in range(3))
    made = GradientBuckets([frozen, first, last], SINGLE)
    frozen.requires_grad_(False)
    first.grad += 1
    made.arrived(first)
    made.arrived(frozen)
    assert made._next == 0
    last.grad += 1
    made.arrived(last)
    assert made._next == 1


def test_frozen_between_forward_and_backward_is_an_error():
    """Its gradient comes nevertheless, into a bucket that was not kept waiting for it."""
    axis = Mesh(dp=1).data
    layers = make_layers()
    made = GradientBuckets(layers.parameters(), axis)
    loss = forward(layers, batch(0, 0))
    layers[0].requires_grad_(False)
    made._buckets[0].handle = reduction._Then(
        reduction.Handle(torch.ones(1)), lambda: None
    )  # as on two ranks
    with pytest.raises(RuntimeError, match="change requires_grad before forward"):
        loss.backward()


def run_different_parameters():
    """Each rank uses its own layer only, and in the second step none of the ranks uses the last one."""
    axis = Mesh(dp=2).data
    layers = make_layers()
    made = GradientBuckets(layers.parameters(), axis, bucket_bytes=100)
    found = []
    for used in ((axis.rank, 2), (axis.rank,)):
        made.zero()
        forward([layers[i] for i in used], batch(axis.rank, 0)).backward()
        made.finish()
        found.append([p.grad.clone() for p in layers.parameters()])
    return found


def test_ranks_may_use_different_parameters(ranks):
    first, second = ranks(2, run_different_parameters)
    for step, gradients in enumerate(first):
        assert all(torch.equal(a, b) for a, b in zip(gradients, second[step], strict=True))
        assert all(bool(x.any()) for x in gradients[:4])
        assert all(bool(x.any()) == (step == 0) for x in gradients[4:])


# ---- sparse


def run_sparse(dtype, cleared):
    axis = Mesh(dp=2).data
    torch.manual_seed(0)
    table = nn.Embedding(9, 3, sparse=True)
    dense = nn.Embedding(9, 3)
    dense.load_state_dict(table.state_dict())
    found = []
    for module in (table, dense):
        made = GradientBuckets(module.parameters(), axis, gradient_dtype=dtype)
        for step in range(2):
            if cleared:
                module.zero_grad()
            else:
                made.zero()
            with made.accumulate():
                module(torch.tensor([axis.rank, 3, 3])).square().sum().backward()
            module(torch.tensor([step, 8 - axis.rank])).sum().backward()
            made.finish()
        found.append(made.gradient(module.weight).clone())
    return found


@pytest.mark.parametrize(("dtype", "cleared"), [(None, True), (None, False), (torch.float64, False)])
def test_sparse_gradients_are_summed_as_dense_ones(ranks, dtype, cleared):
    for sparse, dense in ranks(2, run_sparse, dtype, cleared):
        assert torch.equal(sparse, dense) and sparse.count_nonzero() > 6
