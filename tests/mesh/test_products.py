"""Products, refinements and folds of meshes with real ranks: their groups are those of the arithmetic."""

import pytest
import torch
import torch.distributed as dist

from pypar.comm import all_reduce_start
from pypar.mesh import Mesh

MESHES = [
    {"dp": 2, "tp": 2},
    {"dp": 4, "ep": 2, "split": {"dp": {"replicate": 2, "shard": 2}}},
    {"tp": 4, "split": {"tp": {"row": 2, "column": 2}}},
    {"dp": 2, "cp": 2, "fold": {"ep": (4, ("dp", "cp"))}},
    {"pp": 4},
    {"pp": 2, "dp": 2, "products": [("dp", "cp", "tied")]},
]


def _groups(options):
    mesh = Mesh(**options)
    seen = {}
    for name in mesh.grid.names:
        axis = getattr(mesh, name)
        assert axis is mesh.axis(name) and axis.name == name
        x = all_reduce_start(torch.tensor([float(mesh.rank), 1.0]), axis).wait()
        assert x.tolist() == [sum(axis.ranks), axis.size]
        assert axis.ranks == mesh.grid.group(mesh.rank, name) and axis.ranks[axis.rank] == dist.get_rank()
        assert axis.rank == mesh.grid.coordinate(mesh.rank, name) and axis.names == (name,)
        seen[name] = axis.ranks
    assert mesh.axis("dp", "cp") is mesh.axis("cp", "dp") is mesh.data
    assert mesh.axis("pp", "dp", "cp", "tp") is mesh.world and mesh.world.grid is mesh.grid
    return seen


@pytest.mark.parametrize("options", MESHES, ids=str)
def test_groups_are_those_of_the_arithmetic(ranks, options):
    for seen in ranks(4, _groups, options):
        assert set(seen) >= {"pp", "dp", "cp", "tp", "ep", "edp", "tied"}


def _products():
    """What a rank needs is declared by that rank alone; all ranks make the groups."""
    mesh = Mesh(pp=4)
    assert mesh.axis("dp", "cp", "tp").size == mesh.axis().size == 1
    mesh = Mesh(dp=2, tp=2)
    with pytest.raises(ValueError) as error:
        mesh.axis("tp", "dp")
    mesh.declare(*([("tp", "dp")] if mesh.rank == 3 else []))
    product = mesh.axis("dp", "tp")
    assert product is mesh.axis("tp", "cp", "dp") and product is not mesh.world
    assert product.group is mesh.world.group and product.names == ("dp", "tp")
    mesh.declare(("dp", "tp"))
    assert mesh.axis("dp", "tp") is product
    total = all_reduce_start(torch.tensor([1.0]), product).wait().item()
    return str(error.value), total, mesh.world.traffic.bytes_sent, product.traffic.bytes_sent


def test_a_product_is_declared_before_it_is_used(ranks):
    for message, total, of_world, of_product in ranks(4, _products):
        assert message == (
            "the product of the axes dp, tp was not declared, so it has no process group; declare it when the mesh is "
            "made, Mesh(..., products=[('dp', 'tp')]), or with mesh.declare(('dp', 'tp')) on every rank"
        )
        assert total == 4.0 and of_world == 0 and of_product > 0


def _tied():
    mesh = Mesh(pp=4, products=[("dp", "cp", "tied")])
    return mesh.tied.ranks, mesh.axis("tied", "dp", "cp").ranks


def test_stages_in_between_are_alone_on_tied(ranks):
    assert ranks(4, _tied) == [((0, 3),) * 2, ((1,),) * 2, ((2,),) * 2, ((0, 3),) * 2]


def test_axes_of_size_one_change_nothing():
    mesh = Mesh()
    assert mesh.axis("dp", "cp", "tied") is mesh.axis("dp", "cp", "tp") is mesh.data
    assert mesh.data.group is None and mesh.ep.size == mesh.edp.size == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Mesh().row,
            AttributeError,
            "this mesh has no axis 'row'; it has pp, dp, cp, tp, ep, edp, tied",
        ),
        (
            lambda: Mesh(split={"tp": {"axis": 1, "b": 1}}),
            ValueError,
            "an axis of a mesh cannot be called 'axis'",
        ),
        (lambda: Mesh(split={"tp": {"a b": 1}}), ValueError, "an axis of a mesh cannot be called 'a b'"),
        (lambda: Mesh(products=[("dp", "edp")]), ValueError, "axes dp, edp are not independent"),
        (
            lambda: Mesh(products=[("rows",)], split={"tp": {"row": 1, "column": 1}}),
            ValueError,
            "the mesh has no axis 'rows'; did you mean 'row'",
        ),
    ],
)
def test_refusals_are_sentences(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)
