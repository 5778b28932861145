"""Sequence layouts: who holds which positions, how a tensor is cut and joined."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pypar.context_parallel import positions, shard, unshard
from pypar.context_parallel.layouts import LAYOUTS, Segment, num_positions, positions_of, segments_of
from pypar.mesh import Axis


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9), st.integers(0, 60))
def test_every_position_is_held_once_and_ranks_hold_equally_many_but_for_one(layout, size, length):
    held = [positions_of(length, rank, size, layout) for rank in range(size)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    counts = [len(part) for part in held]
    assert max(counts) - min(counts) <= 1
    assert all((part.diff() > 0).all() for part in held)
    for rank, part in enumerate(held):
        segments = segments_of(length, rank, size, layout)
        assert num_positions(segments) == len(part) and all(s.count > 0 for s in segments)
        assert [s.last for s in segments] == [part[end - 1] for end in _ends(segments)]


def _ends(segments):
    return [sum(s.count for s in segments[: i + 1]) for i in range(len(segments))]


def test_positions():
    assert [positions_of(8, rank, 2, "contiguous").tolist() for rank in (0, 1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [positions_of(8, rank, 2, "zigzag").tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert positions(5, Axis.single("cp"), "zigzag").tolist() == [0, 1, 2, 3, 4]
    assert positions(5, Axis.single("cp"), "zigzag").dtype == torch.int64


def test_positions_that_do_not_divide():
    def held(length, size, layout):
        return [positions_of(length, rank, size, layout).tolist() for rank in range(size)]

    assert held(5, 2, "contiguous") == [[0, 1, 2], [3, 4]]
    assert held(7, 2, "zigzag") == [[0, 1, 6], [2, 3, 4, 5]]
    assert held(7, 3, "striped") == [[0, 3, 6], [1, 4], [2, 5]]
    assert held(1, 3, "contiguous") == [[0], [], []]
    assert held(2, 3, "zigzag") == [[0], [1], []]


def test_halves_that_meet_are_one_segment():
    assert segments_of(24, 2, 3, "zigzag") == (Segment(8, 8),)
    assert segments_of(24, 1, 3, "zigzag") == (Segment(4, 4), Segment(16, 4))


def test_layout_refusals():
    with pytest.raises(
        ValueError, match="'zig-zag' is not one of contiguous, zigzag, striped; did you mean 'z"
    ):
        shard(torch.zeros(4), 0, Axis.single("cp"), "zig-zag")
    with pytest.raises(ValueError, match=r"x has 4 positions on rank 0 .* share of a sequence of 5 .* is 5"):
        unshard(torch.zeros(4), 0, Axis.single("cp"), "zigzag", length=5)


def _round_trip(layout):
    axis = Axis.of(dist.group.WORLD, "cp")
    whole = torch.randn(3, 8 * axis.size, 2, generator=torch.Generator().manual_seed(1))
    for dim, x in ((1, whole), (-2, whole), (0, whole.transpose(0, 1)), (2, whole.movedim(1, 2))):
        part = shard(x, dim, axis, layout)
        assert part.is_contiguous() and part.shape[dim] == 8
        assert torch.equal(part, x.index_select(dim, positions(x.shape[dim], axis, layout)))
        assert torch.equal(unshard(part, dim, dist.group.WORLD, layout), x)
    x = whole.clone().requires_grad_()
    part = shard(x, 1, axis, layout)
    (unshard(part, 1, axis, layout) * whole).sum().backward()
    rows = positions(x.shape[1], axis, layout)
    expected = torch.zeros_like(whole)
    expected[:, rows] = whole[:, rows]
    assert torch.equal(x.grad, expected)


def _uneven_round_trip(layout, length):
    axis = Axis.of(dist.group.WORLD, "cp")
    whole = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    part = shard(whole, 1, axis, layout)
    joined = unshard(part, 1, axis, layout, length=length)
    assert torch.equal(joined, whole)
    joined.square().sum().backward()
    rows = positions(length, axis, layout)
    expected = torch.zeros_like(whole)
    expected[:, rows] = 2 * whole.detach()[:, rows]
    assert torch.equal(whole.grad, expected)
    return part.shape[1]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world_size", [2, 4])
def test_unshard_undoes_shard(ranks, layout, world_size):
    ranks(world_size, _round_trip, layout)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_unshard_undoes_shard_of_any_length(ranks, layout):
    for length in (0, 1, 3, 7, 17):
        assert sum(ranks(4, _uneven_round_trip, layout, length)) == length


def test_shard_of_one_rank_is_the_whole():
    x = torch.randn(2, 5)
    assert shard(x, 1, Axis.single("cp"), "zigzag") is x
    assert unshard(x, 1, Axis.single("cp"), "contiguous") is x
