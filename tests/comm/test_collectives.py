"""Started collectives: values against the definition on one process, bytes against theory, buffers.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch
import torch.distributed as dist

from pypar.comm import all_gather_start, all_reduce_start, reduce_scatter_start, wire_bytes
from pypar.comm.collectives import local_slice
from pypar.mesh import Axis
from tests.harness.pairs import pairwise
from tests.harness.refusals import sentences

WORLD_SIZES = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16]


def _axis():
    return Axis.of(dist.group.WORLD, "world")


def _input(rank, shape, dtype):
    """Small whole numbers: their sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def _all_inputs(axis, shape, dtype):
    return [_input(rank, shape, dtype) for rank in range(axis.size)]


def _strided(x):
    """The same values with every stride different from a contiguous tensor's."""
    return x.repeat_interleave(2, dim=-1)[..., ::2] if x.ndim == 1 else x.mT.contiguous().mT


def _check_all_reduce(shape, dtype):
    axis = _axis()
    inputs = _all_inputs(axis, shape, dtype)
    for make in (torch.clone, _strided):
        x = make(inputs[axis.rank])
        assert all_reduce_start(x, axis).wait() is x
        assert torch.equal(x, sum(inputs))
        x = make(inputs[axis.rank])
        all_reduce_start(x, axis, dist.ReduceOp.MAX).wait()
        assert torch.equal(x, torch.stack(inputs).amax(0))


def _check_all_gather(shape, dim, dtype):
    axis = _axis()
    inputs = _all_inputs(axis, shape, dtype)
    for make in (torch.clone, _strided):
        x = make(inputs[axis.rank])
        result = all_gather_start(x, axis, dim).wait()
        assert torch.equal(result, torch.cat(inputs, dim))
        assert torch.equal(x, inputs[axis.rank])
        assert not result.numel() or axis.size == 1 or result.data_ptr() != x.data_ptr()


def _check_reduce_scatter(shape, dim, dtype):
    axis = _axis()
    shape = list(shape)
    shape[dim] *= axis.size
    inputs = _all_inputs(axis, shape, dtype)
    for make in (torch.clone, _strided):
        x = make(inputs[axis.rank])
        result = reduce_scatter_start(x, axis, dim).wait()
        assert torch.equal(result, sum(inputs).chunk(axis.size, dim)[axis.rank])
        assert torch.equal(x, inputs[axis.rank])
        assert result.is_contiguous() or axis.size == 1


@pytest.mark.parametrize(
    ("shape", "world_size", "dtype"), pairwise([(1,), (7,), (3, 5), (63, 111)], WORLD_SIZES, DTYPES)
)
def test_all_reduce(ranks, world_size, shape, dtype):
    ranks(world_size, _check_all_reduce, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("shape", "dim"), [((7,), 0), ((3, 5), 0), ((3, 5), -1), ((1, 63, 5), 1), ((2, 3, 5), 1), ((2, 0, 5), 1)]
)
def test_all_gather_and_reduce_scatter(ranks, world_size, shape, dim, dtype):
    ranks(world_size, _check_all_gather, shape, dim, dtype)
    ranks(world_size, _check_reduce_scatter, shape, dim, dtype)


def _gather_one_sequence():
    axis = _axis()
    handle = all_gather_start(torch.ones(1, 3, 5), axis, 1)
    received_into = handle._tensor.data_ptr()
    return handle.wait().data_ptr() == received_into


def test_gather_on_dim_1_of_one_sequence_makes_no_copy(ranks):
    assert ranks(2, _gather_one_sequence) == [True, True]


def _sum_bf16():
    """1 + 2^-8 + 2^-8 is 1 when each sum is rounded to bf16, and 1 + 2^-7 when only the last one is."""
    axis = _axis()
    x = torch.full((axis.size,), 1.0 if axis.rank == 0 else 2.0**-8 if axis.rank < 3 else 0.0)
    return reduce_scatter_start(x.bfloat16(), axis).wait().item()


def test_reduce_scatter_adds_bf16_in_fp32(ranks):
    assert ranks(4, _sum_bf16) == [1 + 2.0**-7] * 4


def _reduce_scatter_options(backend, columns, dtype):
    """The mean, and a result that lies in this rank's part of what is summed; each bit as the definition says."""
    axis = Axis.of(dist.new_group(backend=backend))
    inputs = [
        torch.randn(3 * axis.size, columns, generator=torch.Generator().manual_seed(r)).to(dtype)
        for r in range(3)
    ]
    total = inputs[0].float() + inputs[1].float() + inputs[2].float()
    for op, exact in ((dist.ReduceOp.SUM, total), (dist.ReduceOp.AVG, total * torch.tensor(1 / 3))):
        if backend == "gloo" and op == dist.ReduceOp.AVG:
            exact = total / 3
        expected = exact.to(dtype).chunk(3)[axis.rank]
        x = inputs[axis.rank].clone()
        assert torch.equal(reduce_scatter_start(x, axis, op=op).wait(), expected)
        assert torch.equal(x, inputs[axis.rank])
        own = x[3 * axis.rank : 3 * axis.rank + 3]
        assert reduce_scatter_start(x, axis, op=op, out=own).wait().data_ptr() == own.data_ptr()
        assert torch.equal(own, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "columns"), [("pypar", 5), ("pypar", 200_001), ("gloo", 5)])
def test_reduce_scatter_means_and_results_in_place(ranks, backend, columns, dtype):
    """Also where the backend takes several steps, of which a later one must not read what an earlier one wrote."""
    ranks(3, _reduce_scatter_options, backend, columns, dtype)


def _many_in_flight():
    axis = _axis()
    reduced = [all_reduce_start(torch.full((n,), float(axis.rank + n)), axis) for n in range(1, 20)]
    gathered = [all_gather_start(torch.full((n,), float(axis.rank + n)), axis) for n in range(1, 20)]
    scattered = [reduce_scatter_start(torch.full((axis.size * n,), float(n)), axis) for n in range(1, 20)]
    offsets = torch.arange(axis.size).float()
    for n in range(19, 0, -1):  # waited for in the opposite order of their starts
        assert torch.equal(scattered[n - 1].wait(), torch.full((n,), float(n * axis.size)))
        assert torch.equal(gathered[n - 1].wait(), (offsets + n).repeat_interleave(n))
        assert torch.equal(reduced[n - 1].wait(), torch.full((n,), (offsets + n).sum().item()))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_many_in_flight_waited_for_in_any_order(ranks, world_size):
    ranks(world_size, _many_in_flight)


def _wait_twice():
    axis = _axis()
    for handle in (
        all_reduce_start(torch.ones(6).view(2, 3).mT, axis),
        all_gather_start(torch.ones(2, 3), axis, 1),
        reduce_scatter_start(torch.ones(4, 2), axis),
    ):
        assert handle.wait() is handle.wait()
        assert not handle._keep and not handle._works and handle._finish is None


def test_waiting_twice_gives_the_same_tensor_and_frees_the_rest(ranks):
    ranks(2, _wait_twice)


def _traffic(shape, dtype):
    axis = _axis()
    traffic = axis.traffic
    x = torch.ones(shape, dtype=dtype)
    counts = []
    for start in (all_reduce_start, all_gather_start, reduce_scatter_start):
        traffic.reset()
        start(x.clone(), axis).wait()
        counts.append((traffic.bytes_sent, dict(traffic.calls)))
        assert traffic.wait_seconds > 0 or axis.size == 1
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bytes_on_the_wire_are_the_theory(ranks, world_size, dtype):
    num_bytes = 12 * 7 * dtype.itemsize
    counts = ranks(world_size, _traffic, (12, 7), dtype)
    if world_size == 1:
        assert counts == [[(0, {})] * 3]
        return
    expected = [
        (2 * (world_size - 1) * num_bytes // world_size, {"all_reduce": 1}),
        ((world_size - 1) * num_bytes, {"all_gather": 1}),
        ((world_size - 1) * num_bytes // world_size, {"reduce_scatter": 1}),
    ]
    assert counts == [expected] * world_size


def test_wire_bytes():
    assert wire_bytes("all_reduce", 1000, 4) == 1500
    assert wire_bytes("all_gather", 1000, 4) == wire_bytes("reduce_scatter", 1000, 4) == 750
    assert wire_bytes("all_to_all", 1000, 4) == 750
    assert wire_bytes("all_reduce", 5, 3) == 6  # 6.67 rounded down
    assert wire_bytes("all_reduce", 1000, 1) == 0


def test_traffic_reset_and_snapshot():
    traffic = Axis.single("tp").traffic
    traffic.record("send", 10)
    traffic.record_wait(0.5)
    before = traffic.snapshot()
    traffic.record("send", 5)
    assert before == (10, {"send": 1}, 0.5)
    assert traffic.snapshot() == (15, {"send": 2}, 0.5)
    assert str(traffic.last) == "send (call 2, 5 bytes to send)"
    traffic.reset()
    assert traffic.snapshot() == (0, {}, 0.0)
    traffic.record("send", 1)
    assert traffic.last is not None and traffic.last.sequence == 3


def test_axis_of_one_copies_nothing():
    axis, x = Axis.single("tp"), torch.ones(3, 5)
    for start in (all_reduce_start, all_gather_start, reduce_scatter_start):
        assert start(x, axis).wait() is x
    assert axis.traffic.bytes_sent == 0 and not axis.traffic.calls and axis.traffic.last is None


def _refusals():
    axis = _axis()
    return sentences(
        lambda: reduce_scatter_start(torch.ones(3, 5), axis, 1),
        lambda: local_slice(torch.ones(1, 4), axis, 0),
        lambda: all_gather_start(torch.ones(3, 5), axis, 2),
        lambda: all_gather_start(torch.tensor(1.0), axis),
    )


def test_refusals_are_sentences(ranks):
    assert ranks(2, _refusals)[0] == [
        "dim 1 (5) of a tensor of shape (3, 5) must divide by the size of axis 'world' (2); "
        "use 4 or 6, or pad it",
        "dim 0 (1) of a tensor of shape (1, 4) must divide by the size of axis 'world' (2); use 2, or pad it",
        "all_gather along dim 2 needs a tensor that has it, but its shape is (3, 5); use a dim from -2 to 1",
        "all_gather along dim 0 needs a tensor that has it, but its shape is (); "
        "give it a dimension with x.view(1)",
    ]


def test_an_axis_of_one_rank_fills_out_too():
    x, out = torch.arange(4.0), torch.zeros(4)
    assert reduce_scatter_start(x, Axis.single("data"), out=out).wait() is out and torch.equal(out, x)
