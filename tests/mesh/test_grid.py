"""The arithmetic of meshes: coordinates and groups of axes, products, refinements and folds, without ranks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from pypar.grid import Grid
from pypar.mesh_shape import mesh_grid
from tests.layout.cases import UNHURRIED, grids, views


@UNHURRIED
@given(some.data())
def test_groups_of_independent_axes_are_the_ranks_that_agree_elsewhere(data):
    grid = data.draw(grids())
    axes = data.draw(views(grid))[: data.draw(some.integers(0, 4))]
    groups = grid.groups(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(grid.num_ranks))
    others = grid.others(*axes)
    assert {len(group) for group in groups} == {math.prod(grid.size(axis) for axis in axes)}
    assert grid.size(*axes, *others) == grid.num_ranks
    for group in groups:
        assert [grid.coordinate(rank, *axes) for rank in group] == list(range(len(group)))
        assert len({grid.coordinate(rank, *others) for rank in group}) == 1


@UNHURRIED
@given(grids())
def test_coordinates_are_those_of_an_array_of_ranks(grid):
    """All of the refined axes at once as dims of an array; the fold as dims in the place of dp and cp."""
    expand = {name: grid.split.get(name, {name: size}) for name, size in grid.sizes.items()}
    dims = {name: size for parts in expand.values() for name, size in parts.items()}
    array = torch.arange(grid.num_ranks).view(tuple(dims.values()))
    size, _ = grid.fold["ep"]
    data = grid.sizes["dp"] * grid.sizes["cp"]
    folded = torch.arange(grid.num_ranks).view(grid.sizes["pp"], data // size, size, grid.sizes["tp"])
    for rank in range(grid.num_ranks):
        place = (array == rank).nonzero()[0].tolist()
        assert [grid.coordinate(rank, name) for name in dims] == place
        place = (folded == rank).nonzero()[0].tolist()
        assert [grid.coordinate(rank, name) for name in ("pp", "edp", "ep", "tp")] == place


@UNHURRIED
@given(grids())
def test_tied_is_the_first_and_the_last_stage(grid):
    last = grid.sizes["pp"] - 1
    for group in grid.groups("tied"):
        stages = [grid.coordinate(rank, "pp") for rank in group]
        assert stages == ([0, last] if last else [0]) or (len(stages) == 1 and 0 < stages[0] < last)
        assert [grid.coordinate(rank, "tied") for rank in group] == list(range(len(group)))
        assert len({grid.coordinate(rank, "dp", "cp", "tp") for rank in group}) == 1
    for group in grid.groups("tied", "dp", "cp"):
        expected = grid.sizes["dp"] * grid.sizes["cp"]
        assert len(group) in (expected, 2 * expected)


def test_the_meshes_of_the_design():
    grid = mesh_grid({"tp": 4}, split={"tp": {"row": 2, "column": 2}})
    assert grid.groups("row") == ((0, 2), (1, 3)) and grid.groups("column") == ((0, 1), (2, 3))
    grid = mesh_grid({"dp": 4, "cp": 2}, fold={"ep": (4, ("dp", "cp"))})
    assert grid.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert grid.groups("edp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert grid.in_order(("cp", "dp")) == ("dp", "cp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mesh_grid({"tp": 4}, split={"tp": {"row": 2, "column": 3}}),
            "axis tp=4 is refined into row=2 x column=3, which is 6; give sizes whose product is 4",
        ),
        (
            lambda: mesh_grid({"tp": 4}, split={"model": {"row": 2, "column": 2}}),
            "split refines an unknown axis 'model'; refine some of pp, dp, cp, tp",
        ),
        (
            lambda: mesh_grid({"tp": 4, "dp": 2}, split={"tp": {"dp": 2, "column": 2}}),
            "'dp' cannot be the name of two axes of a mesh; give each a name of its own",
        ),
        (
            lambda: mesh_grid({"dp": 4, "cp": 2, "ep": 3}),
            "ep=3 must divide dp x cp (8), whose ranks it folds; use one of 1, 2, 4, 8",
        ),
        (
            lambda: mesh_grid({"dp": 4}, fold={"ep": (2, ("cp", "dp"))}),
            "fold 'ep' is made of the axes cp, dp; use some of pp, dp, cp, tp, each once and in this order",
        ),
        (
            lambda: mesh_grid({"dp": 4, "cp": 2}, fold={"ep": (2, ("dp", "tp"))}),
            "fold 'ep' is made of the axes dp, tp, but cp lies between them; fold axes that are neighbours in pp, dp, "
            "cp, tp",
        ),
        (
            lambda: mesh_grid({"dp": 4, "ep": 2}, fold={"ep": (2, ("dp",))}),
            "ep=2 and fold={'ep': (2, ('dp',))} both say what ep is; give one of them",
        ),
        (
            lambda: mesh_grid({"dp": 4}, split={"dp": {"replicate": 2, "shard": 2}}).groups("dp", "shard"),
            "axes dp, shard are not independent: dp and shard share ranks; use axes of one view of the ranks",
        ),
        (
            lambda: mesh_grid({"dp": 4}).coordinate(0, "dq"),
            "the mesh has no axis 'dq'; did you mean 'dp'",
        ),
        (
            lambda: Grid({"a": 2}, stages="b"),
            "stages='b' names no axis; use one of a",
        ),
    ],
)
def test_refusals_are_sentences(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message
