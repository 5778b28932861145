"""Gathers and sums of many tensors at once, each rank with rows of its own sizes."""

import pytest
import torch
import torch.distributed as dist

from pypar.comm import shared_empty, wire_bytes
from pypar.data_parallel.pieces import gather_pieces_start, reduce_pieces_start
from pypar.mesh import Axis

# Rows of each rank: of one tensor none on the last rank, of one none anywhere; large ones take several steps.
ROWS = [[3, 2, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0], [70_001, 70_000, 70_000, 70_000]]
WIDTH = 5


def _axis(transport):
    return Axis.of(dist.new_group(backend=transport), "data")


def _wholes(size, rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(sum(rows[:size]), WIDTH, generator=generator).to(dtype) for rows in ROWS]


def _split(wholes, size):
    """[rank][tensor]"""
    return list(zip(*(x.split(rows[:size]) for x, rows in zip(wholes, ROWS, strict=True)), strict=True))


def _gather(transport, dtype, is_shared):
    axis = _axis(transport)
    whole = _wholes(axis.size, 0, dtype)
    own = [x.clone() for x in _split(whole, axis.size)[axis.rank]]
    flat = None
    if is_shared:
        longest = sum(rows[0] for rows in ROWS) * WIDTH
        flat = shared_empty(longest, dtype, axis)[: sum(x.numel() for x in own)]
        flat.copy_(torch.cat([x.flatten() for x in own]))
    out = [torch.full_like(x, 7) for x in whole]
    gather_pieces_start(own, _split(out, axis.size), axis, flat).wait()
    assert all(torch.equal(x, y) for x, y in zip(out, whole, strict=True))
    num_bytes = sum(x.nbytes for x in whole)
    assert axis.traffic.bytes_sent == wire_bytes("all_gather", num_bytes, axis.size)
    return axis.group.native.num_in_place if transport == "pypar" else 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_rows_of_all(ranks, size):
    for transport, dtype, is_shared in (
        ("pypar", torch.float32, False),
        ("pypar", torch.bfloat16, True),
        ("gloo", torch.bfloat16, False),
    ):
        for in_place in ranks(size, _gather, transport, dtype, is_shared):
            assert in_place == (1 if is_shared else 0)


def _reduce(transport, dtype):
    axis = _axis(transport)
    of_ranks = [_wholes(axis.size, rank, dtype) for rank in range(axis.size)]
    parts = _split(of_ranks[axis.rank], axis.size)
    out = [torch.empty_like(x) for x in parts[axis.rank]]
    reduce_pieces_start(parts, out, axis).wait()
    summed = []
    for each in map(list, zip(*of_ranks, strict=True)):
        values = each
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [torch.add(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        summed.append(values[0])
    assert all(torch.equal(x, y) for x, y in zip(out, _split(summed, axis.size)[axis.rank], strict=True))
    own = parts[axis.rank]
    reduce_pieces_start(parts, own, axis).wait()  # in place
    assert all(torch.equal(x, y) for x, y in zip(own, out, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_sums_of_its_rows(ranks, size):
    """In the order of the backend: neighbours first."""
    for transport, dtype in (("pypar", torch.float32), ("pypar", torch.float64), ("gloo", torch.float32)):
        ranks(size, _reduce, transport, dtype)
