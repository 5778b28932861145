"""Sequence layouts: who holds which positions, how a tensor is cut and joined, what each hop computes."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pypar.context_parallel import positions, shard, unshard
from pypar.context_parallel.hops import hops
from pypar.context_parallel.layouts import LAYOUTS, positions_of
from pypar.mesh import Axis


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9), st.integers(1, 12))
def test_every_position_is_held_once_and_ranks_hold_equally_many(layout, size, chunk):
    length = 2 * size * chunk
    held = [positions_of(length, rank, size, layout) for rank in range(size)]
    assert {len(part) for part in held} == {length // size}
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    assert all((part.diff() > 0).all() for part in held)


def test_positions():
    assert [positions_of(8, rank, 2, "contiguous").tolist() for rank in (0, 1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [positions_of(8, rank, 2, "zigzag").tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert positions(5, Axis.single("cp"), "zigzag").tolist() == [0, 1, 2, 3, 4]
    assert positions(5, Axis.single("cp"), "zigzag").dtype == torch.int64


def test_layout_refusals():
    zigzag = r"\(1002\) must divide by twice the cp size \(2 x 4\) for the zigzag layout; use 1000 or 1008"
    with pytest.raises(ValueError, match=zigzag):
        positions_of(1002, 0, 4, "zigzag")
    with pytest.raises(ValueError, match=r"\(7\) must divide by the cp size \(2\).*use 6 or 8"):
        positions_of(7, 0, 2, "contiguous")
    with pytest.raises(ValueError, match=r"use 8, or pad"):
        positions_of(3, 0, 4, "zigzag")
    with pytest.raises(ValueError, match="'zig-zag' is not one of contiguous, zigzag; did you mean 'zigzag'"):
        shard(torch.zeros(4), 0, Axis.single("cp"), "zig-zag")


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


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world_size", [2, 4])
def test_unshard_undoes_shard(ranks, layout, world_size):
    ranks(world_size, _round_trip, layout)


def test_shard_of_one_rank_is_the_whole():
    x = torch.randn(2, 5)
    assert shard(x, 1, Axis.single("cp"), "zigzag") is x
    assert unshard(x, 1, Axis.single("cp"), "contiguous") is x


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_hops_cover_the_mask_exactly_once(layout, causal, size):
    length = 6  # on each rank
    held = [positions_of(length * size, rank, size, layout) for rank in range(size)]
    for rank in range(size):
        for hop, item in enumerate(hops(length, rank, size, layout, causal=causal)):
            source = (rank - hop) % size
            visible = (
                held[source][None, :] <= held[rank][:, None] if causal else torch.ones(length, length).bool()
            )
            covered = torch.zeros(length, length, dtype=torch.bool)
            if item is not None:
                block = covered[item.queries, item.keys]
                block |= torch.ones_like(block).tril() if item.causal else torch.ones_like(block)
            assert torch.equal(covered, visible)


def test_zigzag_gives_every_rank_the_same_work():
    def area(item):
        if item is None:
            return 0
        queries, keys = (s.stop - s.start for s in (item.queries, item.keys))
        return queries * (queries + 1) // 2 if item.causal else queries * keys

    work = {
        layout: {sum(area(item) for item in hops(8, rank, 4, layout, causal=True)) for rank in range(4)}
        for layout in LAYOUTS
    }
    assert len(work["zigzag"]) == 1 and len(work["contiguous"]) == 4
