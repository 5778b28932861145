"""Sends, receives and exchanges: values, order, many in flight, counters, refusals."""

import pytest
import torch
import torch.distributed as dist

from pypar.comm import (
    all_gather_start,
    all_reduce_start,
    exchange_start,
    receive_start,
    send_start,
)
from pypar.mesh import Axis, Mesh
from tests.harness.refusals import sentences

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def _axis():
    return Axis.of(dist.group.WORLD, "world")


def _value(rank, index, shape=(3, 5), dtype=torch.float32):
    return torch.full(shape, rank * 64 + index).to(dtype)


def _pass_along(dtype):
    """Rank 0 sends to 1, 1 to 2, ..."""
    axis = _axis()
    received = None
    if axis.rank > 0:
        received = receive_start((3, 5), dtype, "cpu", axis.rank - 1, axis).wait()
    if axis.rank < axis.size - 1:
        x = _value(axis.rank, 1, dtype=dtype)
        assert send_start(x, axis.rank + 1, axis).wait() is x
    return received


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_send_and_receive(ranks, world_size, dtype):
    for rank, received in enumerate(ranks(world_size, _pass_along, dtype)):
        assert rank == 0 and received is None or torch.equal(received, _value(rank - 1, 1, dtype=dtype))


def _exchanges(dtype):
    """Two batches: two messages to the next rank and one to the previous, then rank 0 alone sends, to the last."""
    axis = _axis()
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    buffers = [torch.empty(shape, dtype=dtype) for shape in ((3, 5), (7,), (2,))]
    sent, received = exchange_start(
        [
            (_value(axis.rank, 0, dtype=dtype).t().contiguous().t(), after),
            (_value(axis.rank, 1, (7,), dtype), after),
            (_value(axis.rank, 2, (2,), dtype), before),
        ],
        [(buffers[0], before), (buffers[1], before), (buffers[2], after)],
        axis,
    )
    late = torch.zeros(4, dtype=dtype)
    more, last = exchange_start(
        [(_value(0, 3, (4,), dtype), axis.size - 1)] if axis.rank == 0 else [],
        [(late, 0)] if axis.rank == axis.size - 1 else [],
        axis,
    )
    for handle, buffer in zip([*received, *last], [*buffers, late], strict=False):
        assert handle.wait() is buffer
    for handle in [*sent, *more]:
        handle.wait()
    for buffer, (peer, index) in zip(buffers, ((before, 0), (before, 1), (after, 2)), strict=True):
        assert torch.equal(buffer, _value(peer, index, buffer.shape, dtype))
    assert torch.equal(late, _value(0, 3, (4,), dtype) if last else torch.zeros(4, dtype=dtype))
    return axis.traffic.snapshot()


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchanges(ranks, world_size):
    for rank, traffic in enumerate(ranks(world_size, _exchanges, torch.float32)):
        assert traffic.bytes_sent == 4 * (15 + 7 + 2) + (16 if rank == 0 else 0)
        assert traffic.calls == {"exchange": 2 if rank in (0, world_size - 1) else 1}


def _pass_on(axis, x):
    """Each rank sends x to the next and receives the previous one's; handles of the send and of the receive."""
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return exchange_start([(x, after)], [(torch.empty_like(x), before)], axis)


def _many_both_ways():
    """As a pipeline does: many messages in both directions between neighbours before any is waited for."""
    axis = _axis()
    peer = 1 - axis.rank
    sizes = [1, 1000, 7, 300_000, 63] * 4
    receives = [receive_start((n,), torch.float32, "cpu", peer, axis) for n in sizes]
    sends = [send_start(_value(axis.rank, i, (n,)), peer, axis) for i, n in enumerate(sizes)]
    for i in reversed(range(len(sizes))):
        assert torch.equal(receives[i].wait(), _value(peer, i, (sizes[i],)))
    for send in sends:
        send.wait()
    return axis.traffic.snapshot()


def test_messages_arrive_in_the_order_of_their_starts(ranks):
    for traffic in ranks(2, _many_both_ways):
        assert traffic.bytes_sent == 4 * 4 * (1 + 1000 + 7 + 300_000 + 63)
        assert traffic.calls == {"send": 20, "receive": 20}
        assert traffic.wait_seconds > 0


def _tags():
    axis = _axis()
    if axis.rank == 0:
        for handle in [send_start(_value(0, tag), 1, axis, tag) for tag in (1, 2)]:
            handle.wait()
        return
    second, first = (receive_start((3, 5), torch.float32, "cpu", 0, axis, tag) for tag in (2, 1))
    assert torch.equal(first.wait(), _value(0, 1))
    assert torch.equal(second.wait(), _value(0, 2))


def test_tags_keep_messages_apart(ranks):
    ranks(2, _tags)


def _strided_send():
    axis = _axis()
    x = torch.arange(15.0).view(3, 5)
    if axis.rank == 0:
        send_start(x.mT, 1, axis).wait()
    else:
        assert torch.equal(receive_start((5, 3), torch.float32, "cpu", 0, axis).wait(), x.mT)


def test_strided_tensor_is_sent_in_its_logical_order(ranks):
    ranks(2, _strided_send)


def _peers_of_a_mesh_axis():
    """Peer indices are positions on the axis, not global ranks."""
    mesh = Mesh(pp=2, tp=2)
    _, (handle,) = _pass_on(mesh.pp, torch.tensor([mesh.world.rank]))
    received = handle.wait()
    if mesh.pp.rank == 0:
        send_start(torch.tensor([mesh.world.rank]), 1, mesh.pp).wait()
        return received.item(), None
    return received.item(), receive_start((1,), torch.int64, "cpu", 0, mesh.pp).wait().item()


def test_peers_are_indices_on_the_axis(ranks):
    assert ranks(4, _peers_of_a_mesh_axis) == [(2, None), (3, None), (0, 0), (1, 1)]


def _around_the_ring(size, dtype):
    """Several tensors travel all the way round, each in an exchange of its own, all in flight at once."""
    axis = _axis()
    tensors = [_value(axis.rank, index, (size + index,), dtype) for index in range(5)]
    for step in range(1, axis.size + 1):
        kept = [x.clone() for x in tensors]
        exchanges = [_pass_on(axis, x) for x in tensors]
        received = [handle.wait() for _, (handle,) in reversed(exchanges)][::-1]
        for (handle,), _ in exchanges:
            handle.wait()
        assert all(torch.equal(x, copy) for x, copy in zip(tensors, kept, strict=True))
        tensors = received
        source = (axis.rank - step) % axis.size
        for index, x in enumerate(tensors):
            assert torch.equal(x, _value(source, index, (size + index,), dtype))
    return axis.traffic.snapshot()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("size", [1, 1023, 200_000])
def test_exchanges_complete_in_the_order_of_their_starts(ranks, world_size, size, dtype):
    for traffic in ranks(world_size, _around_the_ring, size, dtype):
        assert traffic.bytes_sent == world_size * sum(range(size, size + 5)) * dtype.itemsize
        assert traffic.calls == {"exchange": world_size * 5}


def _exchanges_beside_collectives():
    """Collectives on the same axis do not mix with exchanges."""
    axis = _axis()
    x = _value(axis.rank, 0, (500,))
    _, (handle,) = _pass_on(axis, x)
    gathered = all_gather_start(x, axis)
    reduced = all_reduce_start(x.clone(), axis)
    _, (another,) = _pass_on(axis, x + 1)
    assert torch.equal(another.wait(), _value((axis.rank - 1) % axis.size, 1, (500,)))
    assert reduced.wait()[0] == sum(64 * r for r in range(axis.size))
    assert torch.equal(gathered.wait()[::500], torch.arange(axis.size) * 64.0)
    assert torch.equal(handle.wait(), _value((axis.rank - 1) % axis.size, 0, (500,)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchanges_and_collectives_in_flight_together(ranks, world_size):
    ranks(world_size, _exchanges_beside_collectives)


def _refusals():
    axis = _axis()
    return sentences(
        lambda: send_start(torch.ones(1), 2, axis),
        lambda: send_start(torch.ones(1), axis.rank, axis),
        lambda: receive_start((1,), torch.float32, "cpu", -1, axis),
        lambda: send_start(torch.ones(1), 0, Axis.single("pp")),
    )


def test_refusals_are_sentences(ranks):
    assert ranks(2, _refusals)[0] == [
        "index 0 cannot send to index 2 of axis 'world', which has size 2; use one of [1]",
        "index 0 cannot send to index 0 of axis 'world', which has size 2; use one of [1]",
        "index 0 cannot receive from index -1 of axis 'world', which has size 2; use one of [1]",
        "index 0 cannot send to index 0 of axis 'pp', which has size 1; there is no other rank to talk to",
    ]
