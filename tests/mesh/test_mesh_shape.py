"""Texts that describe a mesh: what they say, that they are written as they are read, refusals."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pypar.grid import DATA
from pypar.mesh_shape import AXIS_NAMES, FOLDS, MeshShape, mesh_grid, parse_mesh


def test_what_a_text_says():
    assert parse_mesh("tp=2,pp=4") == MeshShape({"pp": 4, "tp": 2})
    assert parse_mesh(" dp = 3 , ep=1, cp=1 ") == MeshShape({"dp": 3})
    assert parse_mesh("") == MeshShape()
    assert parse_mesh("dp=4, tp=4( row=2, column = 2 )") == MeshShape(
        {"dp": 4, "tp": 4}, split={"tp": {"row": 2, "column": 2}}
    )
    assert parse_mesh("ep=4,dp=2,cp=2") == MeshShape({"dp": 2, "cp": 2}, fold={"ep": (4, DATA)})
    assert parse_mesh("dp=4,ep=2(dp)") == MeshShape({"dp": 4}, fold={"ep": (2, ("dp",))})
    assert parse_mesh("dp=4,cp=2,pair=2(dp,cp)").grid.groups("pair") == ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("tp=2,pp=4", "pp=4,tp=2"),
        ("", "tp=1"),
        ("ep=2,dp=4", "dp=4,ep=2"),
        ("ep=2(dp,cp),dp=4", "dp=4,ep=2"),
        ("ep=2(dp),dp=4", "dp=4,ep=2(dp)"),
        ("tp=4(row=2,column=2)", "tp=4(row=2,column=2)"),
        ("tp=1(row=1,column=1)", "tp=1(row=1,column=1)"),
        ("x=1(dp,cp)", "x=1(dp,cp)"),
    ],
)
def test_how_a_shape_is_written(text, written):
    assert str(parse_mesh(text)) == written


def _divisors(number):
    return st.sampled_from([n for n in range(1, number + 1) if number % n == 0])


@st.composite
def _shapes(draw):
    sizes, split, fold = {}, {}, {}
    for axis in AXIS_NAMES:
        parts = draw(st.lists(st.integers(1, 3), max_size=2))
        sizes[axis] = math.prod(parts)
        if parts and draw(st.booleans()):
            split[axis] = {f"{axis}{i}": size for i, size in enumerate(parts)}
    for name, axes in {**FOLDS, "other": ("pp", "dp"), "inner": ("cp",)}.items():
        if draw(st.booleans()):
            fold[name] = draw(_divisors(math.prod(sizes[axis] for axis in axes))), axes
    return sizes, split, fold


@settings(deadline=None)
@given(_shapes())
def test_what_is_written_is_read_as_it_was(given_shape):
    sizes, split, fold = given_shape
    shape = MeshShape(sizes, split, fold)
    again = parse_mesh(str(shape))
    assert str(again) == str(shape) and again == parse_mesh(str(again))
    assert again.grid == shape.grid
    assert again.split == split and {n: f for n, f in fold.items() if f != (1, DATA)} == again.fold


def test_views_are_what_refinements_and_folds_add():
    shape = parse_mesh("dp=4,cp=2,tp=4(row=4,column=1),ep=2,all=8(dp,cp)")
    assert shape.views == {"row": "tp=4(row=4,column=1)", "ep": "ep=2", "edp": "ep=2", "all": "all=8(dp,cp)"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp=2", "mesh 'tpp=2' names an unknown axis 'tpp'; did you mean 'tp', as in tp=2,pp=2"),
        (
            "model=2",
            "mesh 'model=2' names an unknown axis 'model'; use some of pp, dp, cp, tp, ep, as in tp=2,pp=2",
        ),
        ("tp=2,tp=4", "mesh 'tp=2,tp=4' gives axis tp twice; give each axis once"),
        ("ep=1,ep=1", "mesh 'ep=1,ep=1' gives axis ep twice; give each axis once"),
        ("tp", "mesh 'tp' must give axis tp a positive whole number, not ''; write tp=2"),
        ("tp=-2", "mesh 'tp=-2' must give axis tp a positive whole number, not '-2'; write tp=2"),
        ("tp=2.5", "mesh 'tp=2.5' must give axis tp a positive whole number, not '2.5'; write tp=2"),
        ("cp=9999999", "mesh 'cp=9999999' gives axis cp more than 1,048,576 ranks; write cp=2"),
        ("tp=0", "mesh axis tp=0 must be a positive whole number; use tp=1 to leave the axis out"),
        ("ep=0", "mesh axis ep=0 must be a positive whole number; use ep=1 to leave the axis out"),
        (
            "tp=4(row=2",
            "mesh 'tp=4(row=2' has a parenthesis without its other half, or one in another; write "
            "dp=4,tp=4(row=2,column=2)",
        ),
        (
            "tp=4(row=2,column=2)dp=2",
            "mesh 'tp=4(row=2,column=2)dp=2' goes on after a parenthesis in 'tp=4(row=2,column=2)dp=2'; put a comma "
            "there",
        ),
        (
            "tp=4(row=2,column)",
            "mesh 'tp=4(row=2,column)' must give axis column a positive whole number, not ''; write column=2",
        ),
        (
            "tp=4(row=2,row=2)",
            "mesh 'tp=4(row=2,row=2)' refines tp into two axes of one name; name each once",
        ),
        (
            "tp=4(row=2,column=3)",
            "axis tp=4 is refined into row=2 x column=3, which is 6; give sizes whose product is 4",
        ),
        ("=2", "mesh '=2' has '=2' where a name and its size belong; write tp=2"),
        (
            "tp=4()",
            "mesh 'tp=4()' leaves a place between the parentheses of tp empty; write tp=4(row=2,column=2) for what an "
            "axis is refined into, ep=2(dp,cp) for what is folded",
        ),
        (
            "dp=4,tp=2(dp)",
            "mesh 'dp=4,tp=2(dp)' makes tp of other axes, and tp has ranks of its own; give the fold another name, or "
            "the sizes of what tp is refined into, as in tp=4(row=2,column=2)",
        ),
        (
            "dp=4,x=2(a=2)",
            "mesh 'dp=4,x=2(a=2)' names an unknown axis 'x'; use some of pp, dp, cp, tp, ep, as in tp=2,pp=2",
        ),
        (
            "dp=4,ep=2(a=2)",
            "mesh 'dp=4,ep=2(a=2)' refines ep, which is made of other axes; refine one of pp, dp, cp, tp",
        ),
        (
            "dp=4,x=2(dq)",
            "fold 'x' is made of the axes dq; use some of pp, dp, cp, tp, each once and in this order",
        ),
        ("dp=4,x=3(dp)", "x=3 must divide dp (4), whose ranks it folds; use one of 1, 2, 4"),
        ("dp=4,dp2=2", "mesh 'dp=4,dp2=2' names an unknown axis 'dp2'; did you mean 'dp', as in tp=2,pp=2"),
        ("dp=4,data=2(dp)", "an axis of a mesh cannot be called 'data'; use another name"),
        ("dp=4(a b=4)", "an axis of a mesh cannot be called 'a b'; use another name"),
        ("dp=4,tp=2(dp=2)", "'dp' cannot be the name of two axes of a mesh; give each a name of its own"),
    ],
)
def test_bad_texts_are_refused(text, message):
    with pytest.raises(ValueError) as error:
        parse_mesh(text)
    assert str(error.value) == message


def test_absurd_sizes_are_refused_at_once():
    """Python itself refuses to read 5000 digits, and counting to 10**12 for the divisors took hours."""
    with pytest.raises(ValueError, match="9' gives axis tp more than 1,048,576 ranks; write tp=2"):
        parse_mesh("tp=" + "9" * 5000)
    with pytest.raises(
        ValueError, match=r"ep=3 must divide dp x cp \(1000000000000\).*use one of 1, 2, 4, 5, 8, "
    ):
        mesh_grid({"dp": 10**6, "cp": 10**6, "ep": 3})


def test_sizes_of_axes_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="a mesh has no axis 'tpp'; did you mean 'tp'"):
        mesh_grid({"tpp": 2})


def test_the_order_of_the_parts_makes_another_mesh():
    first, second = parse_mesh("tp=4(row=2,column=2)"), parse_mesh("tp=4(column=2,row=2)")
    assert first.grid.groups("row") != second.grid.groups("row")
    assert first != second and first.grid != second.grid
    assert len({first, second, parse_mesh(" tp=4(row=2, column=2)")}) == 2


def test_an_axis_is_not_refined_into_nothing():
    with pytest.raises(ValueError, match="axis tp is refined into nothing"):
        MeshShape(split={"tp": {}})
