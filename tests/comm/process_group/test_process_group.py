"""The torch.distributed backend "pypar": every collective against what it means, and what happens when ranks fail.

The long tests have every combination, the quick ones every pair.
"""

import itertools
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness.pairs import pairwise

WORLD_SIZES = [1, 2, 3, 4]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
# Below and above one step, one and two shots, odd counts.
COUNTS = [0, 1, 63, 1023, 70_001, 300_007, 1_100_003]


def value(rank, count, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(0, 5, (count,), generator=generator).to(dtype)


def reduced(values, op):
    """Neighbours first, then neighbours of their results, in fp32 for 16 bits: what the backend promises bit by bit."""
    wide = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in values]
    combine = {
        "PRODUCT": torch.mul,
        "MIN": torch.minimum,
        "MAX": torch.maximum,
        "BAND": torch.bitwise_and,
        "BOR": torch.bitwise_or,
        "BXOR": torch.bitwise_xor,
    }.get(op, torch.add)
    while len(wide) > 1:
        wide = [combine(*wide[i : i + 2]) if i + 1 < len(wide) else wide[i] for i in range(0, len(wide), 2)]
    total = wide[0].clone()
    if op == "AVG":
        total = total * torch.tensor(1 / len(values), dtype=total.dtype)
    return total.to(values[0].dtype)


def _group(backend="pypar"):
    return dist.new_group(backend=backend)


def _all_reduces(cases):
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    for seed, (count, dtype, op) in enumerate(cases):
        x = value(rank, count, dtype, seed)
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group)
        expected = reduced([value(r, count, dtype, seed) for r in range(size)], op)
        assert torch.equal(x, expected), (count, dtype, op, (x - expected).abs().max())


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_all_reduce_is_the_sum_of_neighbours_bit_by_bit(ranks, size):
    cases = list(itertools.product(COUNTS, FLOATS, ["SUM"]))
    cases += itertools.product([1023, 70_001], FLOATS, ["AVG", "PRODUCT", "MIN", "MAX"])
    cases += itertools.product([1023], INTEGERS, ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"])
    ranks(size, _all_reduces, cases)


def _bools():
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    x = torch.tensor([rank == 0, True, False, rank == size - 1])
    any_, all_ = x.clone(), x.clone()
    dist.all_reduce(any_, dist.ReduceOp.MAX, group)
    dist.all_reduce(all_, dist.ReduceOp.MIN, group)
    return any_.tolist(), all_.tolist()


def test_bools(ranks):
    assert ranks(3, _bools) == [([True, True, False, True], [False, True, False, False])] * 3


def _moves(count, dtype):
    """Everything that moves data, in one go; the values of rank r are value(r, ...)."""
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    values = [value(r, count, dtype) for r in range(size)]
    mine = values[rank]
    for root in range(size):
        x = mine.clone()
        dist.broadcast(x, root, group)
        assert torch.equal(x, values[root])
        outs = [torch.empty_like(mine) for _ in range(size)] if rank == root else None
        dist.gather(mine, outs, root, group)
        assert outs is None or all(map(torch.equal, outs, values))
        dist.scatter(x, values if rank == root else None, root, group)
        assert torch.equal(x, mine)
    outs = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(outs, mine, group)
    assert all(map(torch.equal, outs, values))
    whole = mine.new_empty(size * count)
    dist.all_gather_into_tensor(whole, mine, group)
    assert torch.equal(whole, torch.cat(values))
    # rank r sends to rank p the value of (r * size + p)
    table = [[value(r * size + p, count, dtype) for p in range(size)] for r in range(size)]
    dist.all_to_all(outs, table[rank], group=group)
    assert all(torch.equal(outs[r], table[r][rank]) for r in range(size))
    dist.all_to_all_single(whole, torch.cat(table[rank]), group=group)
    assert torch.equal(whole, torch.cat([table[r][rank] for r in range(size)]))


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("count", [0, 1, 70_001, 600_001])
def test_what_moves_data(ranks, size, count):
    ranks(size, _moves, count, torch.float32)


def _moves_of_types():
    for dtype in [*FLOATS, *INTEGERS]:
        _moves(33, dtype)
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool):
        mine = (torch.arange(9) % 3 + rank).to(dtype)
        outs = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(outs, mine, group)
        for r, out in enumerate(outs):
            assert torch.equal(
                out.to(torch.complex64), (torch.arange(9) % 3 + r).to(dtype).to(torch.complex64)
            )


def test_types_that_are_moved(ranks):
    ranks(2, _moves_of_types)


def _reduce_scatters(count, dtype, op):
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    table = [[value(r * size + p, count, dtype) for p in range(size)] for r in range(size)]
    expected = reduced([table[r][rank] for r in range(size)], op)
    out = torch.empty_like(expected)
    dist.reduce_scatter(out, table[rank], getattr(dist.ReduceOp, op), group)
    assert torch.equal(out, expected)
    dist.reduce_scatter_tensor(out, torch.cat(table[rank]), getattr(dist.ReduceOp, op), group)
    assert torch.equal(out, expected)
    x = table[rank][0].clone()
    dist.reduce(x, size - 1, getattr(dist.ReduceOp, op), group)
    assert rank != size - 1 or torch.equal(x, reduced([table[r][0] for r in range(size)], op))


@pytest.mark.parametrize(("op", "dtype", "size"), pairwise(["SUM", "AVG"], FLOATS, WORLD_SIZES))
def test_reduce_scatter_and_reduce(ranks, size, dtype, op):
    for count in (1, 1023, 400_001):
        ranks(size, _reduce_scatters, count, dtype, op)


def _uneven():
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    lengths = [r * 40_000 for r in range(size)]
    outs = [torch.empty(n, 3) for n in lengths]
    dist.all_gather(outs, torch.full((lengths[rank], 3), float(rank)), group)
    assert all((out == r).all() for r, out in enumerate(outs))
    ins = [torch.full((n, 3), float(rank)) for n in lengths]
    out = torch.empty(lengths[rank], 3)
    dist.reduce_scatter(out, ins, group=group)
    assert (out == sum(range(size))).all()
    # rank r sends (r + 1) * (p + 1) * 1000 rows to rank p
    splits = [(rank + 1) * (p + 1) * 1000 for p in range(size)]
    x = torch.cat([torch.full((n, 2), float(rank * size + p)) for p, n in enumerate(splits)])
    received = torch.empty(sum(splits), 2)
    dist.all_to_all_single(received, x, splits, splits, group=group)
    expected = torch.cat([torch.full((n, 2), float(r * size + rank)) for r, n in enumerate(splits)])
    assert torch.equal(received, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_sizes(ranks, size):
    ranks(size, _uneven)


def _strided():
    group, rank = _group(), dist.get_rank()
    x = torch.arange(60.0).reshape(6, 10) * (rank + 1)
    part = x.T[::2]
    dist.all_reduce(part, group=group)
    expected = torch.arange(60.0).reshape(6, 10) * (rank + 1)
    expected.T[::2] = (torch.arange(60.0).reshape(6, 10) * 3).T[::2]
    assert torch.equal(x, expected)
    out = torch.zeros(4, 10)[:, ::2]
    dist.all_gather_into_tensor(out, torch.full((5, 2), float(rank)).T, group=group)
    assert torch.equal(out, torch.tensor([[0.0], [0.0], [1.0], [1.0]]).expand(4, 5))
    # What memory holds is not what this one says.
    negative = torch.full((3,), 1 + 2j).conj().imag
    dist.all_reduce(negative, group=group)
    assert torch.equal(negative.resolve_neg(), torch.full((3,), -4.0))


def test_tensors_of_any_strides(ranks):
    ranks(2, _strided)


def _messages():
    group, size, rank = _group(), dist.get_world_size(), dist.get_rank()
    following, previous = (rank + 1) % size, (rank - 1) % size
    for count in (0, 1, 1_000_003):  # the last is many times what a stream holds
        received = torch.empty(count)
        operations = [
            dist.P2POp(dist.isend, torch.full((count,), float(rank)), following, group),
            dist.P2POp(dist.irecv, received, previous, group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        assert (received == previous).all()
    # Tags decide, not the order; what nobody wants yet is kept.
    sent = [dist.isend(torch.full((50_000,), float(tag)), following, group, tag=tag) for tag in (3, 1, 2)]
    for tag in (1, 2, 3):
        x = torch.empty(50_000)
        dist.recv(x, previous, group, tag=tag)
        assert (x == tag).all()
    for work in sent:
        work.wait()
    # From anyone.
    if rank:
        dist.send(torch.tensor([rank]), 0, group, tag=9)
        return None
    x = torch.empty(1, dtype=torch.int64)
    sources = [dist.recv(x, None, group, tag=9) for _ in range(size - 1)]
    return sorted(sources)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_messages(ranks, size):
    assert ranks(size, _messages)[0] == list(range(1, size))


def _message_to_itself():
    group, rank = _group(), dist.get_rank()
    x = torch.empty(200_000)
    works = [dist.isend(torch.full((200_000,), float(rank)), rank, group), dist.irecv(x, rank, group)]
    for work in works:
        work.wait()
    assert (x == rank).all()


def test_a_message_to_itself(ranks):
    ranks(2, _message_to_itself)


def _in_the_background(delay_s):
    """All ranks start; rank 1 comes late; rank 0 computes meanwhile and finds the result there."""
    group, rank = _group(), dist.get_rank()
    x = torch.full((2_000_000,), float(rank + 1))
    dist.barrier(group)
    if rank == 1:
        time.sleep(delay_s)
    works = [dist.all_reduce(x, group=group, async_op=True) for _ in range(3)]
    started = time.perf_counter()
    while not works[-1].is_completed():
        assert time.perf_counter() - started < 30
        time.sleep(0.01)  # no wait(): only the group's own thread can have done it
    assert (x == 3 * 2 * 2).all()
    works[-1].get_future().wait()


def test_async_work_needs_nobody_to_wait_for_it(ranks):
    ranks(2, _in_the_background, 0.3)


def _several_groups():
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([0, 1], backend="pypar"), dist.new_group([2, 3], backend="pypar"), _group()]
    pair, world = groups[rank // 2], groups[2]
    x, y = torch.tensor([float(rank)]), torch.tensor([1.0])
    works = []
    for _ in range(50):
        works += [
            dist.all_reduce(x, group=pair, async_op=True),
            dist.all_reduce(y, group=world, async_op=True),
        ]
    for work in works:
        work.wait()
    assert y.item() == float(size) ** 50
    return x.item() / 2**49


def test_several_groups_at_once(ranks):
    assert ranks(4, _several_groups) == [1.0, 1.0, 5.0, 5.0]
