"""Wrong use of gradient buckets: an error on every rank, never a hang and never a wrong sum."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pypar.data_parallel import GradientBuckets
from pypar.mesh import Axis, Mesh

SINGLE = Axis.single("data")


def backward(layer):
    layer(torch.ones(3)).sum().backward()


def run_misuse(way):
    """The same on every rank: each one gets the error, none waits for another."""
    axis = Mesh(dp=2).data if way.endswith("on two ranks") else SINGLE
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    made = GradientBuckets(layer.parameters(), axis)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        if way.startswith("finish first"):
            made.finish()
        elif way.startswith("finish twice"):
            backward(layer)
            made.finish()
            made.finish()
        elif way.startswith("backward twice"):
            backward(layer)
            backward(layer)
        elif way.startswith("accumulate last"):
            backward(layer)
            with made.accumulate():
                backward(layer)
        elif way.startswith("no zero"):
            backward(layer)
            made.finish()
            backward(layer)
        elif way.startswith("unused not zeroed"):
            backward(layer)
            made.finish()
            layer.weight.grad = None
            (layer.weight.sum()).backward()
            made.finish()
        elif way.startswith("zero in flight"):
            backward(layer)
            made.zero()
        elif way.startswith("scale in flight"):
            backward(layer)
            made.scale(2.0)
    if axis.size > 1:
        dist.barrier()
    return str(caught.value)


MISUSES = {
    "finish first": "no backward reached the parameters",
    "finish twice": "no backward reached the parameters",
    "backward twice": "`with buckets.accumulate():`",
    "accumulate last": "`with buckets.accumulate():`",
    "no zero": "call buckets.zero() before",
    "unused not zeroed": "call buckets.zero() before",
    "zero in flight": "call finish() first",
    "scale in flight": "call finish() first",
}


@pytest.mark.parametrize("way", MISUSES)
def test_misuse_is_an_error(ranks, way):
    assert MISUSES[way] in run_misuse(way)
    for message in ranks(2, run_misuse, f"{way} on two ranks"):
        assert MISUSES[way] in message


def run_different_parameters(what):
    axis = Mesh(dp=2).data
    torch.manual_seed(axis.rank if what == "values" else 0)
    sizes = [3, 2] if what == "shapes" and axis.rank else [2, 3]
    parameters = [nn.Parameter(torch.randn(n)) for n in sizes]
    with pytest.raises(ValueError) as caught:
        GradientBuckets(parameters, axis)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("values", "parameter 0 and 1 more"), ("shapes", "list of names, shapes and dtypes")],
)
def test_ranks_with_different_parameters_are_refused(ranks, what, sentence):
    """Found before any step: otherwise each rank would train a model of its own, or sums would mix up
    weights."""
    for message in ranks(2, run_different_parameters, what):
        assert sentence in message and "not the same on all 2 ranks" in message


def test_bad_arguments_get_a_sentence():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        GradientBuckets([torch.nn.Parameter(torch.ones(2), requires_grad=False)], SINGLE)
    with pytest.raises(ValueError, match=r"bucket_bytes \(0\)"):
        GradientBuckets(nn.Linear(1, 1).parameters(), SINGLE, bucket_bytes=0)
    with pytest.raises(ValueError, match="not among the parameters"):
        GradientBuckets(nn.Linear(1, 1).parameters(), SINGLE).gradient(nn.Parameter(torch.ones(2)))


def run_converted(way):
    made, layer = None, nn.Linear(3, 2)
    axis = Mesh(dp=2).data
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    made = GradientBuckets(layer.parameters(), axis)
    if way == "without gradients":
        layer.zero_grad()
    if way == "in half":
        with made.accumulate():
            backward(layer)
    layer.to(torch.float64)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.ones(3, dtype=torch.float64)).sum().backward()
    return str(caught.value)


@pytest.mark.parametrize("way", ["with gradients", "without gradients", "in half"])
def test_parameters_that_were_converted_are_refused(ranks, way):
    """Their gradients are no longer in the buckets, and every rank would go on with its own."""
    for message in ranks(2, run_converted, way):
        assert "was converted or moved" in message


def run_frozen_without_zero():
    """A bucket of a frozen and a trained gradient starts before finish(), with what the frozen one holds."""
    frozen, trained = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = GradientBuckets([frozen, trained], Mesh(dp=2).data, comm_dtype=torch.bfloat16, rebuild=False)
    (frozen * trained).sum().backward()
    made.finish()
    frozen.grad = trained.grad = None  # what optimizer.zero_grad() does
    frozen.requires_grad_(False)
    (frozen * trained).sum().backward()
    in_flight = made._next
    made.finish()
    return in_flight, made.gradient(frozen).tolist(), made.gradient(trained).tolist()


def test_a_frozen_gradient_is_zero_before_its_bucket_starts(ranks):
    assert ranks(2, run_frozen_without_zero) == [(1, [0.0, 0.0], [2.0, 2.0])] * 2
