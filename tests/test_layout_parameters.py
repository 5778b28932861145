"""Parts of global tensors, DTensors made from them, first values by name."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint

from pypar.layout import Layout, initial_weight, layout_of, local_part, local_shape, set_layout, to_dtensor
from pypar.mesh import Mesh

# (mesh sizes, shards of a [12, 8] tensor)
CASES = [
    ({"tp": 4}, (("tp", 0),)),
    ({"tp": 4}, (("tp", 1),)),
    ({"tp": 2, "pp": 2}, (("tp", 1),)),
    ({"dp": 2, "tp": 2}, ()),
    ({"cp": 2, "tp": 2}, (("tp", 0), ("cp", 1))),
]


def _whole():
    return torch.arange(96.0).view(12, 8)


def _check_part(sizes, shards):
    mesh = Mesh(**sizes)
    layout = Layout((12, 8), shards)
    part = local_part(_whole(), layout, mesh)
    expected = _whole()
    for name, dim in shards:
        axis = getattr(mesh, name)
        expected = expected.chunk(axis.size, dim)[axis.rank]
    assert torch.equal(part, expected) and part.is_contiguous()
    assert tuple(part.shape) == local_shape(layout, mesh)
    assert part.untyped_storage().nbytes() == part.nbytes, "the part keeps the whole tensor alive"
    dtensor = to_dtensor(part, layout, mesh)
    assert dtensor.shape == (12, 8) and dtensor.stride() == (8, 1) and not dtensor.requires_grad
    assert dtensor.to_local().data_ptr() == part.data_ptr()
    assert torch.equal(dtensor.full_tensor(), _whole())
    return True


@pytest.mark.parametrize(("sizes", "shards"), CASES)
def test_parts_make_up_the_whole(ranks, sizes, shards):
    assert all(ranks(4, _check_part, sizes, shards))


def test_one_rank_holds_the_whole():
    mesh, whole = Mesh(), _whole().requires_grad_()
    layout = Layout((12, 8), (("tp", 0),))
    assert torch.equal(local_part(whole, layout, mesh), whole)
    assert local_shape(layout, mesh) == (12, 8)
    plain = to_dtensor(whole, layout, mesh)
    assert type(plain) is torch.Tensor and plain.data_ptr() == whole.data_ptr() and not plain.requires_grad


def _state(sizes, fill):
    mesh = Mesh(**sizes)
    layouts = {
        "row": Layout((12, 8), (("tp", 1),)),
        "column": Layout((12, 8), (("tp", 0),)),
        "norm": Layout((7,)),
    }
    state = {}
    for index, (name, layout) in enumerate(layouts.items()):
        if sizes.get("pp", 1) > 1 and mesh.pp.rank != index % 2:
            continue  # each stage has its own parameters
        whole = torch.arange(float(torch.Size(layout.global_shape).numel())).view(layout.global_shape) + index
        local = local_part(whole if fill else torch.zeros_like(whole), layout, mesh)
        state[name] = (to_dtensor(local, layout, mesh), local, local_part(whole, layout, mesh))
    return state


def _save(sizes, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({name: x for name, (x, _, _) in _state(sizes, True).items()}, checkpoint_id=folder)


def _load(sizes, folder):
    state = _state(sizes, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load({name: x for name, (x, _, _) in state.items()}, checkpoint_id=folder)
    for name, (_, local, expected) in state.items():
        assert torch.equal(local, expected), name
    return list(state)


@pytest.mark.parametrize("saved", [{}, {"tp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "tp": 2}])
@pytest.mark.parametrize("loaded", [{}, {"tp": 4}, {"pp": 2}])
def test_checkpoint_of_any_layout_loads_in_any_other(ranks, tmp_path, saved, loaded):
    sizes = [torch.tensor([1, *sizes.values()]).prod().item() for sizes in (saved, loaded)]
    ranks(sizes[0], _save, saved, str(tmp_path))
    assert set().union(*ranks(sizes[1], _load, loaded, str(tmp_path))) == {"row", "column", "norm"}


def test_layout_travels_with_the_parameter():
    param = torch.nn.Parameter(torch.ones(4, 8))
    assert layout_of(param) == Layout((4, 8))
    layout = Layout((12, 8), (("tp", 0),), gradient_sum_axes=("tp",))
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
            lambda: Layout((4,), (("model", 0),)),
            "layout names an unknown mesh axis 'model'; use one of pp, dp, cp, tp",
        ),
        (
            lambda: Layout((4,), (), ("norm",)),
            "layout names an unknown mesh axis 'norm'; use one of pp, dp, cp, tp",
        ),
        (
            lambda: Layout((4,), (("tp", 1),)),
            "layout cuts dim 1 over tp, but the tensor's shape is (4,); use a dim from 0 to 0",
        ),
        (
            lambda: Layout((4, 4), (("tp", 0), ("tp", 1))),
            "layout shards (('tp', 0), ('tp', 1)) must name each mesh axis and each dim at most once",
        ),
        (
            lambda: set_layout(torch.ones(5, 8), Layout((12, 8), (("tp", 0),))),
            "a parameter of shape (5, 8) cannot be a part of (12, 8) cut by (('tp', 0),); "
            "the dims that are not cut must be equal and the others must divide",
        ),
        (
            lambda: set_layout(torch.ones(12), Layout((12, 8))),
            "a parameter of shape (12,) cannot be a part of (12, 8) cut by (); "
            "the dims that are not cut must be equal and the others must divide",
        ),
        (
            lambda: local_part(torch.ones(3), Layout((4,)), Mesh()),
            "a tensor of shape (3,) does not have the layout's global shape (4,); pass the whole tensor",
        ),
        (
            lambda: to_dtensor(torch.ones(3), Layout((4,)), Mesh()),
            "this rank's part of (4,) cut by () on Mesh(pp=1, dp=1, cp=1, tp=1) has shape (4,), "
            "but the tensor has (3,); pass the part that `local_part` gives",
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


def _indivisible():
    with pytest.raises(ValueError) as error:
        local_shape(Layout((9, 8), (("tp", 0),)), Mesh(tp=2))
    return str(error.value)


def test_dim_that_does_not_divide_is_refused(ranks):
    assert ranks(2, _indivisible)[0] == (
        "dim 0 (9) of a tensor of shape (9, 8) must divide by the tp size (2); use 8 or 10"
    )


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
    layout = Layout((64, 48), (("tp", 0),))
    part = local_part(initial_weight("w", (64, 48), 0, 1.0), layout, mesh)
    whole = to_dtensor(part, layout, mesh).full_tensor()
    assert dist.get_world_size() == 4
    return whole


def test_initial_weight_is_the_same_in_every_layout(ranks):
    expected = initial_weight("w", (64, 48), 0, 1.0)
    for sizes in ({"tp": 4}, {"pp": 2, "tp": 2}, {"dp": 4}):
        assert all(torch.equal(whole, expected) for whole in ranks(4, _weights_by_rank, sizes))
