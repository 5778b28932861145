"""PowerSGD: what it sends, what it keeps for later, and that training gets there nevertheless."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pypar.comm import wire_bytes
from pypar.data_parallel import GradientBuckets
from pypar.data_parallel.power_sgd import PowerSGD, factored_shape
from pypar.mesh import Axis
from tests.harness.samples import draw, relative

RANKS = 2
SHAPES = [(48, 33), (7,), (16, 3, 5), (4, 4), (33, 64)]  # [7] and [4, 4] are not worth two factors of rank 2


def _axis():
    return Axis.of(dist.new_group(backend="pypar"), "data")


def _parameters(shapes=SHAPES):
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def _backward(parameters, gradients):
    """A backward that leaves these gradients."""
    sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True)).backward()


def _low_rank(shape, directions, seed):
    m, n = shape[0], torch.Size(shape).numel() // shape[0]
    return (draw(m, directions, seed=seed) @ draw(directions, n, seed=seed + 50)).reshape(shape)


def _gradients(rank, step, directions=None):
    return [
        draw(*shape, seed=1000 * step + 100 * rank + i)
        if directions is None or len(shape) == 1
        else _low_rank(shape, directions, 1000 * step + 100 * rank + i)
        for i, shape in enumerate(SHAPES)
    ]


def _total(step, directions=None):
    return [sum(gs) for gs in zip(*(_gradients(r, step, directions) for r in range(RANKS)), strict=True)]


def _make(parameters, axis, rank=2, **options):
    return GradientBuckets(parameters, axis, power_sgd_rank=rank, first_bucket_bytes=64, **options)


def _low_rank_is_exact(average):
    axis = _axis()
    parameters = _parameters()
    buckets = _make(parameters, axis, average=average)
    for step in range(3):
        buckets.zero()
        _backward(parameters, [(step + 1) * g for g in _gradients(axis.rank, 0, directions=1)])
        buckets.finish()
        for parameter, total in zip(parameters, _total(0, directions=1), strict=True):
            expected = (step + 1) * (total / RANKS if average else total)
            assert relative(parameter.grad, expected) < 1e-5


@pytest.mark.parametrize("average", [False, True])
def test_gradients_of_low_rank_are_exact(ranks, average):
    """One direction on each of two ranks: the sum has two, and two factors of rank 2 hold it."""
    ranks(RANKS, _low_rank_is_exact, average)


def _nothing_is_lost(bucket_bytes):
    """What the sums lack is in the errors: sum of results + errors of all ranks = sum of gradients."""
    axis = _axis()
    parameters = _parameters()
    buckets = _make(parameters, axis, bucket_bytes=bucket_bytes)
    results = [torch.zeros(shape) for shape in SHAPES]
    steps = 5
    for step in range(steps):
        buckets.zero()
        _backward(parameters, _gradients(axis.rank, step))
        buckets.finish()
        for result, parameter in zip(results, parameters, strict=True):
            result += parameter.grad
    errors = buckets.power_sgd.state_dict()["errors"]
    for i, result in enumerate(results):
        error = errors.get(f"parameter {i}", torch.zeros(SHAPES[i])).reshape(SHAPES[i]).clone()
        dist.all_reduce(error, group=axis.group)
        expected = sum(_total(step)[i] for step in range(steps))
        assert relative(result + error, expected) < 1e-5
        is_compressed = factored_shape(torch.Size(SHAPES[i]), 2) is not None
        assert (f"parameter {i}" in errors) == is_compressed
        assert (relative(result, expected) > 1e-2) == is_compressed
    return [result.tolist() for result in results]


def test_what_the_sums_lack_is_in_the_errors_and_bits_do_not_depend_on_bucket_or_rank(ranks):
    small, large = (ranks(RANKS, _nothing_is_lost, bucket_bytes) for bucket_bytes in (64, 1 << 20))
    assert small[0] == small[1] == large[0] == large[1]


def _bytes_on_the_wire():
    axis = _axis()
    shapes = [(64, 48), (48, 32), (32,)]
    parameters = _parameters(shapes)
    buckets = _make(parameters, axis, rebuild=False)
    axis.traffic.reset()
    _backward(parameters, [torch.ones(shape) for shape in shapes])
    buckets.finish()
    return axis.traffic.bytes_sent


def test_bytes_on_the_wire_are_those_of_the_factors(ranks):
    numbers = 2 * (64 + 48) + 2 * (48 + 32) + 32
    expected = wire_bytes("all_reduce", 4 * numbers, RANKS)
    assert ranks(RANKS, _bytes_on_the_wire) == [expected] * RANKS


def _trained(rank, forgets=False):
    """The share of the loss that is left after some steps of a linear network on each rank's half of the data."""
    axis = _axis()
    torch.manual_seed(0)
    model = nn.Linear(24, 16)
    inputs = draw(64, 24, seed=1)
    targets = inputs @ draw(24, 16, seed=2)
    mine = slice(axis.rank * 32, axis.rank * 32 + 32)
    buckets = GradientBuckets(model.parameters(), axis, average=True, power_sgd_rank=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(100):
        buckets.zero()
        if forgets:
            for error in buckets.power_sgd.state_dict()["errors"].values():
                error.zero_()
        (model(inputs[mine]) - targets[mine]).square().mean().backward()
        buckets.finish()
        optimizer.step()
        with torch.no_grad():
            losses.append((model(inputs) - targets).square().mean().item())
    return losses[-1] / losses[0]


def test_training_gets_as_far_as_with_exact_gradients(ranks):
    exact, compressed = (ranks(RANKS, _trained, rank)[0] for rank in (0, 2))
    forgetful = ranks(RANKS, _trained, 2, True)[0]
    assert compressed < 1.2 * exact < 0.1 * forgetful, (exact, compressed, forgetful)


def _nothing_then_something(first):
    axis = _axis()
    parameters = _parameters()
    buckets = _make(parameters, axis)
    for step, factor in enumerate([first, 1.0]):
        buckets.zero()
        _backward(parameters, [factor * g for g in _gradients(axis.rank, step, directions=1)])
        buckets.finish()
    for parameter, expected in zip(parameters, _total(1, directions=1), strict=True):
        assert relative(parameter.grad, expected) < 1e-5


@pytest.mark.parametrize("first", [0.0, float("nan"), float("inf")])
def test_a_step_of_zeros_or_of_no_numbers_leaves_no_trace(ranks, first):
    ranks(RANKS, _nothing_then_something, first)


def _interrupted(is_interrupted):
    axis = _axis()
    parameters = _parameters()
    buckets = _make(parameters, axis)
    for step in range(4):
        buckets.zero()
        _backward(parameters, _gradients(axis.rank, step))
        buckets.finish()
        if step == 1 and is_interrupted:
            state = buckets.power_sgd.state_dict()
            buckets.close()
            buckets = _make(parameters, axis)
            buckets.power_sgd.load_state_dict(state)
    return [p.grad.tolist() for p in parameters]


def test_a_loaded_state_goes_on_with_the_same_bits(ranks):
    assert ranks(RANKS, _interrupted, True) == ranks(RANKS, _interrupted, False)


def test_refusals():
    with pytest.raises(ValueError, match=r"power_sgd_rank \(-1\) must be a positive whole number"):
        PowerSGD(-1)
    state = {"errors": {"w": torch.zeros(4, 4)}, "factors": {"w": torch.zeros(4, 2)}}
    with pytest.raises(ValueError, match=r"'w' was made with power_sgd_rank=2, this run has 3"):
        PowerSGD(3).load_state_dict(state)


def test_what_is_worth_two_factors():
    assert factored_shape(torch.Size([48, 33]), 2) == (48, 33)
    assert factored_shape(torch.Size([16, 3, 5]), 2) == (16, 15)
    assert factored_shape(torch.Size([4, 4]), 2) is None  # 16 numbers against 16
    assert factored_shape(torch.Size([1000]), 1) is None
    assert factored_shape(torch.Size([0, 5]), 1) is None
