"""How buckets are reduced: the same bits however they are cut, scattered over the ranks, rounded on the way."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pypar.comm import wire_bytes
from pypar.data_parallel import GradientBuckets
from pypar.mesh import Axis, Mesh

SIZES = [(1,), (63,), (37, 3), (1023,), (5,)]


def make_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SIZES]


def factors_of(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + rank)
    return [(torch.randn(shape, generator=generator) * 10**rank).to(dtype) for shape in SIZES]


def backward(parameters, rank, order):
    """Each parameter's gradient is its factor; gradients become ready in `order`."""
    parts = list(zip(parameters, factors_of(rank, parameters[0].dtype), strict=True))
    for i in order:
        (parts[i][0] * parts[i][1]).sum().backward()


def orders(rank):
    """A different one on each rank."""
    return [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 4, 0, 3, 1), (3, 0, 4, 1, 2)][rank]


def run_bits(world_size, average, comm_dtype, dtype):
    """Gradients for several ways to cut, two steps each, and each gradient reduced by itself."""
    axis = Mesh(dp=world_size).data
    found = []
    for bucket_bytes, first_bucket_bytes, rebuild in (
        (1, 1, True),
        (300, 64, True),
        (300, 64, False),
        (1 << 20,) * 2 + (True,),
    ):
        parameters = make_parameters(dtype)
        made = GradientBuckets(
            parameters, axis, bucket_bytes=bucket_bytes, first_bucket_bytes=first_bucket_bytes,
            average=average, comm_dtype=comm_dtype, rebuild=rebuild,
        )  # fmt: skip
        for step in range(2):
            made.zero()
            backward(parameters, axis.rank, orders((axis.rank + step) % 4))
            made.finish()
        found.append([p.grad.clone() for p in parameters])
        assert not any(b.flat[b.num_elements :].any() for b in made._buckets)
    alone = factors_of(axis.rank, dtype)
    for x in alone:
        if comm_dtype is not None and world_size > 1:
            sent = (x * (1 / world_size if average else 1.0)).to(comm_dtype)
            dist.all_reduce(sent, group=axis.group)
            x.copy_(sent)
        elif world_size > 1:
            dist.all_reduce(x, dist.ReduceOp.AVG if average else dist.ReduceOp.SUM, group=axis.group)
    return [*found, alone]


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(
    ("comm_dtype", "dtype"),
    [(None, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
     (None, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bits_do_not_depend_on_the_buckets_or_on_the_order(ranks, world_size, average, comm_dtype, dtype):
    """Nor on the rank; and they are those of an all_reduce of each gradient."""
    results = ranks(world_size, run_bits, world_size, average, comm_dtype, dtype)
    expected = results[0][-1]
    for ways in results:
        for gradients in ways:
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def run_fp16_mean():
    axis = Mesh(dp=2).data
    p = nn.Parameter(torch.zeros(4))
    made = GradientBuckets([p], axis, average=True, comm_dtype=torch.float16)
    (p * 60000.0).sum().backward()
    made.finish()
    return p.grad.tolist()


def test_the_mean_of_what_fits_into_fp16_fits(ranks):
    """The sum of two 60000 would be infinite there: the factor comes before the rounding."""
    assert ranks(2, run_fp16_mean) == [[60000.0] * 4] * 2


def run_accumulated():
    """Only what travels is rounded: microbatches add up in fp32, in the parameter's gradient."""
    axis = Mesh(dp=2).data
    p = nn.Parameter(torch.zeros(3))
    made = GradientBuckets([p], axis, comm_dtype=torch.bfloat16)
    axis.traffic.reset()
    with made.accumulate():
        p.sum().backward()
        for _ in range(3):
            (p * 2.0**-9).sum().backward()
    (p * 2.0**-9).sum().backward()
    before = p.grad.tolist()
    made.finish()
    return before, p.grad.tolist(), p.grad.dtype, axis.traffic.snapshot().bytes_sent - 8 * (axis.rank == 0)


def test_only_what_travels_is_rounded(ranks):
    for before, after, dtype, num_bytes in ranks(2, run_accumulated):
        assert before == [1 + 2.0**-7] * 3 and after == [2 + 2.0**-6] * 3 and dtype == torch.float32
        assert num_bytes == wire_bytes("all_reduce", 3 * 2, 2)


# ---- reduce-scatter


def run_scattered(world_size, average, comm_dtype, dtype):
    axis = Mesh(dp=world_size).data if world_size > 1 else Axis.single("data")
    kept = dict(bucket_bytes=300, first_bucket_bytes=64, average=average, comm_dtype=comm_dtype)
    whole, scattered = make_parameters(dtype), make_parameters(dtype)
    made = GradientBuckets(whole, axis, **kept)
    parts = GradientBuckets(scattered, axis, reduce_scatter=True, **kept)
    shards = parts.shards()
    for _ in range(2):
        for buckets, parameters in ((made, whole), (parts, scattered)):
            axis.traffic.reset()
            buckets.zero()
            backward(parameters, axis.rank, orders(axis.rank))
            buckets.finish()
    own = [torch.zeros(p.numel()) for p in whole]  # how often this rank answers for each element
    index = {p: i for i, p in enumerate(scattered)}
    for flat, pieces in shards:
        used = torch.zeros(flat.numel(), dtype=torch.bool)
        for parameter, elements, place in pieces:
            i = index[parameter]
            own[i][elements] += 1
            used[place] = True
            assert torch.equal(flat[place], whole[i].grad.flatten()[elements])
            assert flat[place].data_ptr() == scattered[i].grad.flatten()[elements].data_ptr()
        assert not flat[~used].any(), "padding is zero"
        assert flat.nbytes % 64 == 0
    with pytest.raises(ValueError, match="no rank has a whole gradient"):
        parts.gradient(scattered[0])
    with pytest.raises(ValueError, match="shards.. is for buckets made with reduce_scatter=True"):
        made.shards()
    padded = sum(b.flat.numel() for b in parts._buckets) * (comm_dtype or dtype).itemsize
    calls = dict(axis.traffic.snapshot().calls), axis.traffic.snapshot().bytes_sent
    return own, calls, parts.num_buckets, padded, parts.padding_bytes, sum(f.nbytes for f, _ in shards)


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(
    ("comm_dtype", "dtype"),
    [(None, torch.float32), (torch.bfloat16, torch.float32), (None, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_hold_the_same_bits_each_once(ranks, world_size, average, comm_dtype, dtype):
    results = ranks(world_size, run_scattered, world_size, average, comm_dtype, dtype)
    for owned in zip(*(own for own, *_ in results), strict=True):
        assert torch.equal(sum(owned), torch.ones_like(owned[0]))
    num_bytes = sum(p.nbytes for p in make_parameters(dtype))
    for _, (calls, sent), num_buckets, padded, padding_bytes, shard_bytes in results:
        assert shard_bytes * world_size == num_bytes + padding_bytes
        assert 0 < padding_bytes < 64 * world_size * num_buckets
        if world_size > 1:
            assert calls == {"reduce_scatter": num_buckets}
            assert sent == wire_bytes("reduce_scatter", padded, world_size)


def run_gloo(average, scatter):
    """What gloo makes of it: no ReduceOp.AVG, another way to scatter."""
    axis = Axis.of(dist.new_group(backend="gloo"))
    parameters = make_parameters()
    made = GradientBuckets(parameters, axis, bucket_bytes=300, average=average, reduce_scatter=scatter)
    backward(parameters, axis.rank, orders(axis.rank))
    made.finish()
    expected = [(a + b) / (2 if average else 1) for a, b in zip(factors_of(0), factors_of(1), strict=True)]
    if not scatter:
        return all(torch.equal(p.grad, x) for p, x in zip(parameters, expected, strict=True))
    index = {p: i for i, p in enumerate(parameters)}
    return all(
        torch.equal(flat[place], expected[index[p]].flatten()[elements])
        for flat, pieces in made.shards()
        for p, elements, place in pieces
    )


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("scatter", [False, True])
def test_over_gloo(ranks, average, scatter):
    assert ranks(2, run_gloo, average, scatter) == [True, True]


def run_half(backend, world_size):
    axis = Axis.of(dist.new_group(backend=backend), "dp")
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    buckets = GradientBuckets([parameter], axis, average=True)
    factor = torch.tensor([60000.0, 40000.0, 0.0, 1.0, -60000.0], dtype=torch.float16)
    (parameter * factor).sum().backward()
    buckets.finish()
    return parameter.grad.tolist()


@pytest.mark.parametrize(("backend", "world_size"), [("gloo", 2), ("gloo", 3), ("pypar", 2)])
def test_a_mean_in_fp16_does_not_overflow_where_its_sum_would(ranks, backend, world_size):
    for found in ranks(world_size, run_half, backend, world_size):
        assert found[1] == pytest.approx(40000, rel=2e-3) and found[3] == 1.0
        if world_size == 2:
            assert found[0] == pytest.approx(60000, rel=2e-3) and found[4] == pytest.approx(-60000, rel=2e-3)
