"""Axes, groups and rank order of meshes; refusals."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist

from pypar.comm import all_reduce_start
from pypar.mesh import AXIS_NAMES, Axis, Mesh, as_axis, parse_mesh
from pypar.mesh_shape import RESERVED, MeshShape, check_mesh


def _factorisations(world_size):
    sizes = range(1, world_size + 1)
    return [p for p in itertools.product(sizes, repeat=4) if p[0] * p[1] * p[2] * p[3] == world_size]


def _axes_of_mesh(sizes):
    mesh = Mesh(**sizes)
    for axis in _axes(mesh):
        assert (axis.group is None) == (axis.size == 1)
        assert axis.ranks[axis.rank] == dist.get_rank()
        assert axis.size == len(axis.ranks)
        x = all_reduce_start(torch.tensor([1.0, dist.get_rank()]), axis).wait()
        assert x.tolist() == [axis.size, sum(axis.ranks)]
    assert mesh.sizes == sizes
    if mesh.device_mesh is not None:
        assert mesh.device_mesh.mesh_dim_names == AXIS_NAMES
        assert tuple(mesh.device_mesh.mesh.shape) == tuple(sizes.values())
        assert list(mesh.device_mesh.get_coordinate()) == [
            mesh.pp.rank,
            mesh.dp.rank,
            mesh.cp.rank,
            mesh.tp.rank,
        ]
    assert mesh.grid.group(mesh.rank, "dp", "cp") == mesh.data.ranks and mesh.rank == mesh.world.rank
    return {axis.name: axis.ranks for axis in _axes(mesh)}


def _axes(mesh):
    return mesh.pp, mesh.dp, mesh.cp, mesh.tp, mesh.data, mesh.world


@pytest.mark.parametrize("world_size", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_factorisation_has_the_right_groups(ranks, world_size):
    for shape in _factorisations(world_size):
        sizes = dict(zip(AXIS_NAMES, shape, strict=True))
        grid = torch.arange(world_size).view(shape)
        for rank, axes in enumerate(ranks(world_size, _axes_of_mesh, sizes)):
            pp, dp, cp, tp = (int(i) for i in (grid == rank).nonzero()[0])
            assert axes == {
                "pp": tuple(grid[:, dp, cp, tp].tolist()),
                "dp": tuple(grid[pp, :, cp, tp].tolist()),
                "cp": tuple(grid[pp, dp, :, tp].tolist()),
                "tp": tuple(grid[pp, dp, cp, :].tolist()),
                "data": tuple(grid[pp, :, :, tp].flatten().tolist()),
                "world": tuple(range(world_size)),
            }


def _two_meshes():
    """Collectives of two meshes, in flight together and waited for crosswise."""
    first, second = Mesh(tp=2, dp=2), Mesh(cp=2, dp=2)
    a = all_reduce_start(torch.tensor([1.0]), first.tp)
    b = all_reduce_start(torch.tensor([10.0]), second.cp)
    c = all_reduce_start(torch.tensor([100.0]), second.data)
    d = all_reduce_start(torch.tensor([1000.0]), first.world)
    assert [h.wait().item() for h in (d, c, b, a)] == [4000.0, 400.0, 20.0, 2.0]
    assert dict(first.tp.traffic.calls) == dict(second.data.traffic.calls) == {"all_reduce": 1}
    assert first.dp.traffic.bytes_sent == second.tp.traffic.bytes_sent == second.world.traffic.bytes_sent == 0
    assert first.tp.traffic.bytes_sent == 4 and first.world.traffic.bytes_sent == 6


def test_two_meshes_do_not_disturb_each_other(ranks):
    ranks(4, _two_meshes)


def _data_counts_apart_from_dp():
    mesh = Mesh(dp=2)
    all_reduce_start(torch.ones(4), mesh.data).wait()
    return mesh.data.traffic.bytes_sent, mesh.dp.traffic.bytes_sent


def test_data_axis_counts_its_own_traffic(ranks):
    assert ranks(2, _data_counts_apart_from_dp) == [(16, 0)] * 2


def test_mesh_of_one_needs_no_process_group():
    assert not dist.is_initialized()
    mesh = Mesh()
    assert mesh.device_mesh is None
    assert all(axis.group is None and axis.ranks == (0,) for axis in _axes(mesh))
    assert [axis.name for axis in _axes(mesh)] == ["pp", "dp", "cp", "tp", "data", "world"]


def _wrap_groups():
    this_rank = dist.get_rank()
    groups = [
        dist.new_group([2, 0]),
        dist.new_group([1, 3]),
        dist.new_group([this_rank], use_local_synchronization=True),
    ]
    axis = as_axis(groups[this_rank % 2])
    assert as_axis(axis) is axis
    assert Axis.of(groups[2], "one").group is None
    with pytest.raises(ValueError) as error:
        Axis.of(groups[1 - this_rank % 2], "cp")
    received = all_reduce_start(torch.tensor([float(this_rank)]), axis).wait().item()
    return axis.name, axis.ranks, axis.rank, received, str(error.value)


def test_process_group_as_axis(ranks):
    results = ranks(4, _wrap_groups)
    assert [result[:4] for result in results] == [
        ("group", (0, 2), 0, 2.0),
        ("group", (1, 3), 0, 4.0),
        ("group", (0, 2), 1, 2.0),
        ("group", (1, 3), 1, 4.0),
    ]
    assert results[0][4] == (
        "rank 0 is not in the process group that axis 'cp' was to wrap; "
        "make the axis on the group's own ranks only"
    )


def test_something_else_as_axis_is_refused():
    with pytest.raises(ValueError, match="must be a pypar Axis .* not None; for all ranks pass"):
        as_axis(None)


def test_copies_of_a_module_share_its_axis():
    axis = Axis.single("tp")
    assert copy.deepcopy({"axis": axis})["axis"] is axis
    assert copy.copy(axis) is axis


def test_mesh_that_does_not_fit_the_ranks_is_refused():
    shape = MeshShape({"tp": 3, "pp": 2})
    check_mesh(shape, 6)
    with pytest.raises(ValueError) as error:
        check_mesh(shape, 4)
    assert str(error.value) == (
        "mesh pp=2,tp=3 needs 6 ranks but 4 were started; start 6 (torchrun --nproc-per-node 6) or use a "
        "mesh whose sizes multiply to 4"
    )
    with pytest.raises(ValueError, match="mesh tp=1 needs 1 rank but 4 were started"):
        check_mesh(parse_mesh(""), 4)
    with pytest.raises(ValueError, match="needs 2 ranks but torch.distributed is not initialised; call"):
        Mesh(dp=2)
    with pytest.raises(
        ValueError, match=r"ep=2 must divide dp x cp \(1\), whose ranks it folds; use one of 1"
    ):
        Mesh(ep=2)
    with pytest.raises(ValueError, match="mesh axis tp=True must be"):
        Mesh(tp=True)


def _wrong_mesh_in_ranks():
    with pytest.raises(ValueError) as error:
        Mesh(tp=4)
    return str(error.value)


def test_wrong_mesh_is_refused_on_every_rank(ranks):
    messages = ranks(2, _wrong_mesh_in_ranks)
    assert messages[0] == messages[1]
    assert messages[0].startswith("mesh tp=4 needs 4 ranks but 2 were started")


def test_no_axis_takes_the_name_of_something_else_of_a_mesh():
    mesh = Mesh()
    public = {name for name in {*vars(mesh), *dir(type(mesh))} if not name.startswith("_")}
    assert public - set(mesh.grid.names) == RESERVED


def _described():
    mesh = Mesh.of(parse_mesh("tp=4(row=2,column=2),pair=2(tp)"))
    return mesh.row.ranks, mesh.column.ranks, mesh.pair.ranks, mesh.pairdp.ranks


def test_a_text_makes_a_mesh_of_refinements_and_folds(ranks):
    assert ranks(4, _described)[1:3] == [
        ((1, 3), (0, 1), (0, 1), (1, 3)),
        ((0, 2), (2, 3), (2, 3), (0, 2)),
    ]


def test_a_refined_mesh_is_another_one():
    mesh = Mesh()
    fine = mesh.refined("dp", {"outer": 1, "inner": 1})
    assert fine.axis("outer", "inner").size == 1 and fine.inner.size == 1 and fine.tp is mesh.tp
    assert "inner" not in mesh.grid.names
    with pytest.raises(ValueError, match="axis 'dp' of mesh .* is refined already"):
        fine.refined("dp", {"a": 1, "b": 1})
