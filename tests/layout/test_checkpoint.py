"""Layouts of every kind go through checkpoints, sharded tensors and norms with real ranks."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pypar.comm import all_reduce_start
from pypar.layout import Cut, Layout, Owner, answers_for, local_part, local_shape
from pypar.mesh import Mesh
from pypar.sharded import Sharded, shard
from pypar.sharded.checkpointable import Stored
from pypar.sharded.tensor import Sharding
from pypar.train import checkpoint
from tests.layout.cases import whole_of

SQUARE = {"split": {"tp": {"row": 2, "column": 2}}}
# name of the case: (options of the mesh, layouts of "experts", "matrix", "fused", "vector", "scalar")
CASES = {
    "one rank": ({}, [Layout((3, 5, 2)), Layout((7, 5)), Layout((9, 3)), Layout((5,)), Layout(())]),
    "two, uneven and fused": (
        {"tp": 2},
        [
            Layout((3, 5, 2), (Cut(0, "tp"),)),
            Layout((7, 5), (Cut(1, "tp"),)),
            Layout((9, 3), (Cut(0, "tp", blocks=(4, 3, 2)),)),
            Layout((5,), owner=Owner("tp", 1)),
            Layout((), owner=Owner("tp", 1)),
        ],
    ),
    "experts": (
        {"dp": 2, "cp": 2, "ep": 2},
        [
            Layout((3, 5, 2), (Cut(0, "ep"), Cut(1, "edp")), sum_over=()),
            Layout((7, 5), (Cut(0, ("dp", "cp")),)),
            Layout((9, 3), (Cut(0, "ep", blocks=(1, 8)),), sum_over=("edp",)),
            Layout((5,), owner=Owner(("dp", "cp"), 2)),
            Layout((), owner=Owner("ep", 1)),
        ],
    ),
    "a square of tp": (
        {"tp": 4, **SQUARE},
        [
            Layout((3, 5, 2), (Cut(1, "row"), Cut(0, "column"))),
            Layout((7, 5), (Cut(0, "row"), Cut(1, "column"))),
            Layout((9, 3), (Cut(0, ("column", "row"), blocks=(3, 3, 3)),)),
            Layout((5,), (Cut(0, "column"), Cut(0, "row"))),
            Layout((), owner=Owner("tp", 3)),
        ],
    ),
    "tp then ZeRO, tied": (
        {"pp": 2, "dp": 2, "products": [("dp", "cp", "tied")]},
        [
            Layout((3, 5, 2), (Cut(0, "dp"),)),
            Layout((7, 5), (Cut(0, "tp"), Cut(0, "dp")), ("dp", "cp", "tied")),
            Layout((9, 3), (Cut(0, "dp", blocks=(2, 7)), Cut(0, "tp"))),
            Layout((5,), sum_over=("dp", "cp", "tied")),
            Layout(()),
        ],
    ),
}
NAMES = ("experts", "matrix", "fused", "vector", "scalar")


def _world_size(case):
    return int(
        torch.tensor(
            [size for name, size in CASES[case][0].items() if name in ("pp", "dp", "cp", "tp")]
        ).prod()
    )


def _state(mesh, case, scale):
    """This rank's parts; on a mesh with stages "experts" is on the first and "fused" and "scalar" on the last."""
    state = {}
    for name, layout in zip(NAMES, CASES[case][1], strict=True):
        stage = {"experts": 0, "fused": mesh.pp.size - 1, "scalar": mesh.pp.size - 1}.get(name, mesh.pp.rank)
        if mesh.pp.rank == stage:
            state[name] = (local_part(scale * whole_of(layout), layout, mesh).clone(), layout)
    return state


def _save(case, folder):
    mesh = Mesh(**CASES[case][0])
    return str(checkpoint.save(Path(folder), 1, _state(mesh, case, 1.0), mesh, {}))


def _load(case, path):
    mesh = Mesh(**CASES[case][0])
    state, expected = _state(mesh, case, 0.0), _state(mesh, case, 1.0)
    checkpoint.load(Path(path), state, mesh)
    assert list(state) == list(expected)
    return [name for name in state if not torch.equal(state[name][0], expected[name][0])]


@pytest.mark.parametrize("written", CASES)
def test_a_checkpoint_of_any_layout_fills_any_other(ranks, tmp_path, written):
    path = ranks(_world_size(written), _save, written, str(tmp_path))[0]
    elements = sum(whole_of(layout).numel() for layout in CASES[written][1])
    stored = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    assert 4 * elements <= stored < 4 * elements + 4096 * _world_size(written), (
        "what ranks share is stored once"
    )
    for read in CASES:
        assert ranks(_world_size(read), _load, read, path) == [[]] * _world_size(read), read


def _square_sum(case):
    mesh = Mesh(**CASES[case][0])
    own = {name: 0.0 for name in NAMES}
    for name, (part, layout) in _state(mesh, case, 1.0).items():
        if answers_for(layout, mesh.grid, mesh.rank):
            own[name] = float(part.square().sum())
    return all_reduce_start(torch.tensor(list(own.values()), dtype=torch.float64), mesh.world).wait().tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_norm_counts_every_element_once(ranks, case):
    expected = [float(whole_of(layout).square().sum()) for layout in CASES[case][1]]
    assert ranks(_world_size(case), _square_sum, case) == [expected] * _world_size(case)


def _wrong_part():
    layout = Layout((7, 2), (Cut(0, "tp"),))
    with pytest.raises(ValueError) as error:
        Stored.of(torch.zeros(2, 2), layout, Mesh(tp=2))
    return str(error.value)


def test_a_part_of_another_shape_is_refused(ranks):
    assert ranks(2, _wrong_part)[1] == (
        "this rank's part of a layout of (7, 2) (dim 0 over tp) has shape (3, 2), but the tensor has (2, 2); pass the "
        "part that `local_part` gives"
    )


def _sharded(options, axes, layout, folder):
    """A tensor that is cut in another way than into equal parts, as a user's script sees it."""
    mesh = Mesh(**options)
    axis, whole = mesh.axis(*axes), whole_of(layout)
    x = shard(local_part(whole, layout, axis), layout, axis, "w")
    assert isinstance(x, Sharded) and x.shape == whole.shape
    assert x.local().shape == local_shape(layout, mesh) and torch.equal(x.full_tensor(), whole)
    total = x.square().sum()
    assert torch.equal(total, whole.square().sum())
    total.backward()
    assert torch.equal(x.grad.full_tensor(), 2 * whole)
    (x.full_tensor() * whole).sum().backward()
    assert torch.equal(x.grad.full_tensor(), 3 * whole)
    with torch.no_grad():
        row = torch.arange(float(whole.shape[-1]))
        assert torch.equal((x + row).full_tensor(), whole + row)
        assert abs(x.norm() - whole.norm()) < 1e-4 * whole.norm()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"w": x.for_state_dict()}, checkpoint_id=folder)
            x.zero_()
            dcp.load({"w": x.for_state_dict()}, checkpoint_id=folder)
        assert torch.equal(x.full_tensor(), whole)
    return str(x._pypar_sharding)


@pytest.mark.parametrize(
    ("options", "axes", "layout", "text"),
    [
        ({"tp": 2}, ("tp",), Layout((7, 4), (Cut(0, "tp"),)), "w (7, 4), cut along dim 0 over axis 'tp'"),
        (
            {"tp": 2},
            ("tp",),
            Layout((4, 9), (Cut(1, "tp", blocks=(4, 5)),)),
            "w (4, 9), cut along dim 1 over axis 'tp'",
        ),
        ({"tp": 2}, ("tp",), Layout((4, 3), owner=Owner("tp", 1)), "w (4, 3), owned by a rank of axis 'tp'"),
        (
            {"tp": 4, **SQUARE, "products": [("row", "column")]},
            ("row", "column"),
            Layout((7, 6), (Cut(1, "row"), Cut(0, "column"))),
            "w (7, 6), cut along dim 1 and 0 over axis 'row x column'",
        ),
    ],
)
def test_tensors_that_are_cut_unevenly_answer_for_the_whole(ranks, tmp_path, options, axes, layout, text):
    assert set(ranks(options["tp"], _sharded, options, axes, layout, str(tmp_path))) == {text}


def test_an_axis_on_which_ranks_hold_the_same_is_refused():
    layout = Layout((4,), (Cut(0, "row"),))
    grid = Mesh(split={"tp": {"row": 1, "column": 1}})
    with pytest.raises(ValueError) as error:
        Sharding(layout, grid.tp, "w")
    assert str(error.value) == (
        "a layout of (4,) (dim 0 over row) is not cut over all of axis 'tp' (tp) and no other; give the axis that is "
        "the product of the layout's axes, mesh.axis(...)"
    )
