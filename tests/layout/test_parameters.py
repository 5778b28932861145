"""Parts of global tensors on a mesh's ranks, layouts that parameters carry, first values by name."""

import pytest
import torch
import torch.distributed as dist

from pypar.layout import Cut, Layout, Owner, layout_of, local_part, local_shape, set_layout
from pypar.mesh import Mesh
from pypar.models.initial_weights import initial_weight
from pypar.sharded import Sharded, shard

# (mesh sizes, cuts of a [12, 8] tensor)
CASES = [
    ({"tp": 4}, (Cut(0, "tp"),)),
    ({"tp": 4}, (Cut(1, "tp"),)),
    ({"tp": 2, "pp": 2}, (Cut(1, "tp"),)),
    ({"dp": 2, "tp": 2}, ()),
    ({"cp": 2, "tp": 2}, (Cut(0, "tp"), Cut(1, "cp"))),
]


def _whole():
    return torch.arange(96.0).view(12, 8)


def _check_part(sizes, cuts):
    mesh = Mesh(**sizes)
    layout = Layout((12, 8), cuts)
    part = local_part(_whole(), layout, mesh)
    expected = _whole()
    for cut in cuts:
        axis = mesh.axis(*cut.axes)
        expected = expected.chunk(axis.size, cut.dim)[axis.rank]
    assert torch.equal(part, expected) and part.is_contiguous()
    assert tuple(part.shape) == local_shape(layout, mesh)
    assert part.untyped_storage().nbytes() == part.nbytes, "the part keeps the whole tensor alive"
    return True


@pytest.mark.parametrize(("sizes", "cuts"), CASES)
def test_parts_make_up_the_whole(ranks, sizes, cuts):
    assert all(ranks(4, _check_part, sizes, cuts))


def test_one_rank_holds_the_whole():
    mesh, whole = Mesh(), _whole().requires_grad_()
    layout = Layout((12, 8), (Cut(0, "tp"),))
    assert torch.equal(local_part(whole, layout, mesh), whole)
    assert local_shape(layout, mesh) == (12, 8)


def test_layout_travels_with_the_parameter():
    param = torch.nn.Parameter(torch.ones(4, 8))
    assert layout_of(param) == Layout((4, 8))
    layout = Layout((12, 8), (Cut(0, "tp"),), ("dp", "cp", "tp"))
    set_layout(param, layout)
    assert layout_of(param) is layout
    module = torch.nn.Module()
    module.weight = param
    assert layout_of(module.bfloat16().weight) is layout


def test_layout_accepts_a_torch_size():
    assert Layout(torch.Size([3, 5])).global_shape == (3, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: local_shape(Layout((4,), (Cut(0, "row"),)), Mesh()),
            "the mesh has no axis 'row'; it has pp, dp, cp, tp, ep, edp, tied",
        ),
        (
            lambda: local_shape(Layout((4, 4), (Cut(0, "dp"), Cut(1, "ep"))), Mesh()),
            "axes dp, ep are not independent: dp and ep share ranks; use axes of one view of the ranks",
        ),
        (
            lambda: local_shape(Layout((4,), owner=Owner("dp", 1)), Mesh()),
            "layout of (4,) (owned by rank 1 of dp) names rank 1 of an axis that has 1 ranks; count from 0",
        ),
        (
            lambda: Layout((4,), (Cut(1, "tp"),)),
            "layout cuts dim 1 over tp, but the tensor's shape is (4,); use a dim from 0 to 0",
        ),
        (
            lambda: Layout((4, 4), (Cut(0, "tp"), Cut(1, "tp"))),
            "layout of (4, 4) (dim 0 over tp, dim 1 over tp) must name each mesh axis at most once in cuts and owner, "
            "and in sum_over",
        ),
        (
            lambda: Layout((8,), (Cut(0, "tp", blocks=(4, 3)),)),
            "blocks (4, 3) of dim 0 must add up to its length 8 and stand in the first cut of the dim",
        ),
        (
            lambda: set_layout(torch.ones(13, 8), Layout((12, 8), (Cut(0, "tp"),))),
            "a parameter of shape (13, 8) does not fit a layout of (12, 8) (dim 0 over tp); the dims that are not cut "
            "must be equal, and a part is no longer than the whole",
        ),
        (
            lambda: set_layout(torch.ones(12), Layout((12, 8))),
            "a parameter of shape (12,) does not fit a layout of (12, 8) (whole on every rank); the dims that are not "
            "cut must be equal, and a part is no longer than the whole",
        ),
        (
            lambda: local_part(torch.ones(3), Layout((4,)), Mesh()),
            "a tensor of shape (3,) does not have the layout's global shape (4,); pass the whole tensor",
        ),
        (
            lambda: initial_weight("norm", (3,), 0, -1.0),
            "the standard deviation of norm is -1.0; it must be 0 or more",
        ),
    ],
)
def test_refusals_are_sentences(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_initial_weight_depends_on_seed_name_and_shape_alone():
    weight = initial_weight("layers.3.attention.q.weight", (63, 111), 7, 0.02)
    torch.manual_seed(1)
    torch.rand(5)
    again = initial_weight("layers.3.attention.q.weight", (63, 111), 7, 0.02)
    assert torch.equal(weight, again)
    assert weight.dtype == torch.float32 and weight.shape == (63, 111)
    others = [("layers.4.attention.q.weight", 7), ("layers.3.attention.q.weight", 8)]
    for name, seed in others:
        assert not torch.equal(weight, initial_weight(name, (63, 111), seed, 0.02))
    assert torch.equal(
        initial_weight("w", (9,), 0, 0.5, torch.bfloat16), initial_weight("w", (9,), 0, 0.5).bfloat16()
    )
    assert torch.equal(initial_weight("w", (9,), 0, 0.0), torch.zeros(9))


def test_initial_weight_does_not_move_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    initial_weight("w", (100,), 0, 1.0)
    assert torch.equal(torch.rand(4), expected)


def test_initial_weight_is_normal():
    weight = initial_weight("embedding.weight", (1000, 1000), 0, 0.02) / 0.02
    assert abs(weight.mean()) < 5e-3 and abs(weight.std() - 1) < 5e-3
    assert abs((weight.abs() < 1).float().mean() - 0.6827) < 3e-3
    neighbour = initial_weight("embedding.bias", (1000, 1000), 0, 0.02) / 0.02
    assert abs((weight * neighbour).mean()) < 5e-3


def _weights_by_rank(sizes):
    mesh = Mesh(**sizes)
    layout = Layout((64, 48), (Cut(0, "tp"),))
    part = shard(local_part(initial_weight("w", (64, 48), 0, 1.0), layout, mesh), layout, mesh.tp)
    assert dist.get_world_size() == 4
    return part.full_tensor().detach() if isinstance(part, Sharded) else part.detach()


def test_initial_weight_is_the_same_in_every_layout(ranks):
    expected = initial_weight("w", (64, 48), 0, 1.0)
    for sizes in ({"tp": 4}, {"pp": 2, "tp": 2}, {"dp": 4}):
        assert all(torch.equal(whole, expected) for whole in ranks(4, _weights_by_rank, sizes))
