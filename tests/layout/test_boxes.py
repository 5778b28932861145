"""Boxes of random layouts on random meshes of up to 64 simulated ranks: who holds what, and who counts it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from pypar.axis import Axis
from pypar.comm.traffic import Traffic
from pypar.grid import SimulatedRank
from pypar.layout import Cut, Layout, Owner, answers_for, assemble, boxes, local_part, local_shape
from pypar.mesh_shape import mesh_grid
from tests.layout.cases import UNHURRIED, cut_directly, grids, holders, layouts, whole_of


def parts_of(whole, layout, grid):
    return [local_part(whole, layout, SimulatedRank(grid, rank)) for rank in range(grid.num_ranks)]


@UNHURRIED
@given(some.data())
def test_parts_are_those_of_tensor_split_and_make_up_the_whole(data):
    grid = data.draw(grids())
    layout = data.draw(layouts(grid))
    whole = whole_of(layout)
    parts = parts_of(whole, layout, grid)
    for rank, part in enumerate(parts):
        assert torch.equal(part, cut_directly(whole, layout, grid, rank))
        assert tuple(part.shape) == local_shape(layout, SimulatedRank(grid, rank))
        held = boxes(layout, grid, rank)
        assert sum(math.prod(box.lengths) for box in held) == part.numel()
        for box in held:
            assert torch.equal(whole[box.slices], part[box.local_slices]) and part[box.local_slices].numel()
    assert torch.equal(assemble(parts, layout, grid), whole)


@UNHURRIED
@given(some.data())
def test_ranks_that_answer_count_each_element_once(data):
    grid = data.draw(grids())
    layout = data.draw(layouts(grid))
    whole = whole_of(layout)
    counted = torch.zeros(layout.global_shape)
    square_sum = 0.0
    for rank in holders(layout, grid):
        if answers_for(layout, grid, rank):
            square_sum += float(local_part(whole, layout, SimulatedRank(grid, rank)).double().square().sum())
            for box in boxes(layout, grid, rank):
                counted[box.slices] += 1
    assert torch.equal(counted, torch.ones(layout.global_shape))
    assert square_sum == float(whole.double().square().sum())


@UNHURRIED
@given(some.data())
def test_any_layout_is_filled_from_the_boxes_of_any_other(data):
    before, after = data.draw(grids()), data.draw(grids())
    layout = data.draw(layouts(before))
    target = data.draw(layouts(after, shape=layout.global_shape))
    whole = whole_of(layout)
    sources = [
        (box, part)
        for rank, part in enumerate(parts_of(whole, layout, before))
        if rank in holders(layout, before) and answers_for(layout, before, rank)
        for box in boxes(layout, before, rank)
    ]
    for rank in range(after.num_ranks):
        part = torch.zeros(local_shape(target, SimulatedRank(after, rank)))
        for box in boxes(target, after, rank):
            for source, held in sources:
                _copy_overlap(part, box, held, source)
        assert torch.equal(part, cut_directly(whole, target, after, rank))


def _copy_overlap(part, box, held, source):
    here, there = [], []
    for dim in range(len(box.offsets)):
        start = max(box.offsets[dim], source.offsets[dim])
        end = min(box.offsets[dim] + box.lengths[dim], source.offsets[dim] + source.lengths[dim])
        if start >= end:
            return
        here.append(slice(start - box.offsets[dim] + box.local_offsets[dim], None))
        there.append(slice(start - source.offsets[dim] + source.local_offsets[dim], None))
        here[-1] = slice(here[-1].start, here[-1].start + end - start)
        there[-1] = slice(there[-1].start, there[-1].start + end - start)
    part[tuple(here)] = held[tuple(there)]


def test_blocks_lie_behind_each_other():
    """q, k, v of 4, 2 and 2 rows, then ZeRO over what tp leaves: the second cut runs through the blocks."""
    grid = mesh_grid({"dp": 2, "tp": 2})
    layout = Layout((8, 3), (Cut(0, "tp", blocks=(4, 2, 2)), Cut(0, "dp")))
    rows = [[box.slices[0] for box in boxes(layout, grid, rank)] for rank in range(4)]
    assert rows == [
        [slice(0, 2)],
        [slice(2, 4)],
        [slice(4, 5), slice(6, 7)],
        [slice(5, 6), slice(7, 8)],
    ]


def test_layouts_of_the_engines_to_come():
    grid = mesh_grid({"dp": 4, "cp": 2, "tp": 4}, {"tp": {"row": 2, "column": 2}}, {"ep": (4, ("dp", "cp"))})
    experts = Layout((8, 6, 5), (Cut(0, "ep"), Cut(1, "tp")), sum_over=("edp",))
    square = Layout((6, 10), (Cut(0, "row"), Cut(1, "column")))
    flat = Layout((7,), owner=Owner(("dp", "cp"), 5))
    assert [len(parts) for parts in (_answering(x, grid) for x in (experts, square, flat))] == [16, 4, 1]
    assert local_shape(experts, SimulatedRank(grid, 0)) == (2, 2, 5)
    assert local_shape(square, SimulatedRank(grid, 3)) == (3, 5)
    assert grid.coordinate(_answering(flat, grid)[0], "dp", "cp") == 5


def _answering(layout, grid):
    return [rank for rank in range(grid.num_ranks) if answers_for(layout, grid, rank)]


def test_a_tied_embedding_is_counted_by_the_first_stage():
    grid = mesh_grid({"pp": 3, "tp": 2})
    tied, other = Layout((4, 2), (Cut(0, "tp"),), ("dp", "cp", "tied")), Layout((4, 2), (Cut(0, "tp"),))
    assert _answering(tied, grid) == [0, 1, 2, 3]  # of which the stage in between has none
    assert _answering(other, grid) == [0, 1, 2, 3, 4, 5]


def test_names_of_an_axis_alone_are_a_grid():
    axis = Axis("tp", None, 1, 2, (4, 5), Traffic("tp"))
    assert torch.equal(
        local_part(torch.arange(5.0), Layout((5,), (Cut(0, axis.names),)), axis), torch.tensor([3.0, 4.0])
    )


def test_a_name_alone_is_one_axis():
    assert Cut(0, "tp").axes == ("tp",) and Owner("dp", 1).axes == ("dp",)
    with pytest.raises(ValueError, match="the mesh has no axis 'row'"):
        boxes(Layout((4,), (Cut(0, "row"),)), mesh_grid({"tp": 2}), 0)
