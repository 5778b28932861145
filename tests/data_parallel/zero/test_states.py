"""States go from any stage and any number of ranks to any other, with their bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pypar
from pypar.mesh import Mesh
from tests.data_parallel.zero.programs import HasBuffers, Model
from tests.data_parallel.zero.training import STAGES
from tests.data_parallel.zero.trees import HALF, Tree, TreeModule, batch, everything
from tests.harness.refusals import sentences

FORMS = STAGES | {
    "2 hybrid": {"stage": 2, "shard_size": 2},
    "3 hybrid": {"stage": 3, "shard_size": 2},
}


def made_store(form, world_size, tree, seed=0, dtype=None):
    model = TreeModule(tree)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += seed * torch.randn(parameter.shape)
    return model, pypar.zero(model, Mesh(dp=world_size), dtype=dtype, **FORMS[form])


def steps(model, store, tree, count):
    """Every rank has the same data, so that the number of ranks changes nothing."""
    optimizer = torch.optim.SGD(store.parameters(), lr=0.02)
    for step in range(count):
        tree.loss(model, 0, step, 0).backward()
        optimizer.step()
        store.publish()
        store.zero_grad()
    return tree.loss(model, 0, 9, 9).item()


def run_save(form, world_size, tree, dtype):
    """What is saved after two steps, and the loss then; later steps do not change it."""
    model, store = made_store(form, world_size, tree, dtype=dtype)
    loss = steps(model, store, tree, 2)
    state = store.state_dict(whole=True)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    steps(model, store, tree, 1)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    return kept, loss


def run_load(form, world_size, tree, dtype, state):
    """What a store of another model saves when it has loaded a state, and the loss then."""
    model, store = made_store(form, world_size, tree, seed=3, dtype=dtype)
    store.load_state_dict(state)
    return dict(store.state_dict(whole=True)), tree.loss(model, 0, 9, 9).item()


ROUTES = (
    ("0", 1, "3", 2),
    ("3", 2, "0", 1),
    ("1", 2, "2", 3),
    ("2", 3, "3 hybrid", 4),
    ("3 hybrid", 4, "1", 2),
    ("3", 3, "2 hybrid", 4),
    ("2 hybrid", 4, "3 keeps", 3),
    ("3 keeps", 4, "3", 3),
)


@pytest.mark.parametrize(
    ("route", "dtype"),
    [
        pytest.param(
            route,
            dtype,
            id=f"{route[0]} on {route[1]} to {route[2]} on {route[3]}, {dtype or 'fp32'}",
            marks=() if index < 5 and (dtype is None) == bool(index % 2) else pytest.mark.slow,
        )
        for index, route in enumerate(ROUTES)
        for dtype in (None, HALF)
    ],
)
def test_whole_states_go_from_any_store_to_any(ranks, route, dtype):
    tree = everything()
    saved = ranks(route[1], run_save, *route[:2], tree, dtype)
    state, loss = saved[0]
    plain = TreeModule(tree).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in plain.items()}
    for other, own_loss in saved[1:]:
        assert own_loss == loss and all(torch.equal(other[name], state[name]) for name in state)
    for loaded, own_loss in ranks(route[3], run_load, *route[2:], tree, dtype, state):
        assert own_loss == loss
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def run_own_rows(form, world_size):
    """This rank's rows after two steps, loaded into another store of the same kind: what follows is the same."""
    tree = everything()
    model, store = made_store(form, world_size, tree)
    steps(model, store, tree, 2)
    rows = store.state_dict(whole=False)
    wanted = store.state_dict(whole=True)
    held = sum(tensor.numel() for tensor in rows.values())
    steps(model, store, tree, 1)  # they are copies
    other, second = made_store(form, world_size, tree, seed=3)
    second.load_state_dict(rows)
    found = second.state_dict(whole=True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    return (
        held,
        sum(tensor.numel() for tensor in wanted.values()),
        steps(other, second, tree, 1),
        tree.loss(model, 0, 9, 9).item(),
    )


@pytest.mark.parametrize(("form", "world_size"), [("1", 2), ("2", 3), ("3", 3), ("3 hybrid", 4)])
def test_rows_of_a_rank_go_into_another_store_of_the_same_kind(ranks, form, world_size):
    for held, whole, loss, expected in ranks(world_size, run_own_rows, form, world_size):
        assert held < whole and loss == expected


def run_buffers(stage):
    torch.manual_seed(0)
    model = HasBuffers()
    store = pypar.zero(model, Mesh(dp=2), stage=stage)
    model.loss(*batch(0, 0, 0), 0).backward()
    state = store.state_dict(whole=True)
    torch.manual_seed(1)
    other = HasBuffers()
    second = pypar.zero(other, Mesh(dp=2), stage=stage)
    second.load_state_dict(state)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in other.named_buffers())
    return set(state) == set(HasBuffers().state_dict())


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_are_in_a_state(ranks, stage):
    assert all(ranks(2, run_buffers, stage))


def run_refused_states(stage):
    model = Model()
    store = pypar.zero(model, Mesh(dp=2), stage=stage)
    state = store.state_dict(whole=True)
    first, *_ = state
    few = {name: tensor for name, tensor in state.items() if name != first}
    said = sentences(
        lambda: store.load_state_dict(few),
        lambda: store.load_state_dict(state | {"layers.9.weight": torch.ones(2)}),
        lambda: store.load_state_dict(state | {first: state[first][:-1]}),
        lambda: store.load_state_dict({}),
    )
    after = store.state_dict(whole=True)
    assert all(torch.equal(after[name], state[name]) for name in state)
    return first, said


@pytest.mark.parametrize("stage", [1, 3])
def test_states_of_other_models_are_refused(ranks, stage):
    (first, said), (_, others) = ranks(2, run_refused_states, stage)
    assert said == others
    assert first in said[0] and "layers.9.weight" in said[1] and first in said[2]


def run_gathered(stage, dtype):
    """Whole parameters to read, then written."""
    tree = everything()
    plain = TreeModule(tree)
    model = TreeModule(tree)
    store = pypar.zero(model, Mesh(dp=3), stage=stage, dtype=dtype)
    with store.gathered():
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            wanted = expected.to(dtype) if dtype is not None else expected
            assert parameter.dtype == wanted.dtype and torch.equal(parameter, wanted), name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 64)
    state = store.state_dict(whole=True)
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), torch.arange(tensor.numel()).view(tensor.shape) / 64), name
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(state[name])
        expected = tree.loss(plain if dtype is None else plain.to(dtype), 0, 0, 0)
    return None if dtype is not None else (tree.loss(model, 0, 0, 0).item(), expected.item())


@pytest.mark.parametrize("dtype", [None, HALF])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_whole_parameters_can_be_read_and_written(ranks, stage, dtype):
    for losses in ranks(3, run_gathered, stage, dtype):
        assert losses is None or losses[0] == losses[1]


def run_forward_inside_gathered():
    model = Model()
    store = pypar.zero(model, Mesh(dp=2), stage=3)
    x = batch(0, 0, 0)[0]
    expected = model(x)
    with store.gathered():
        inside = functional.linear(x, model.before.weight, model.before.bias)
        with store.gathered():
            found = model(x)
        for layer in model.layers:
            inside = layer(inside)
        inside = functional.linear(inside, model.after.weight)
        found.sum().backward()
    return (
        torch.equal(found, expected),
        torch.equal(inside, expected),
        [p.untyped_storage().size() for p in model.parameters()],
    )


def test_forward_and_backward_inside_gathered(ranks):
    for forward, parts, sizes in ranks(2, run_forward_inside_gathered):
        assert forward and parts and not any(sizes)


def test_one_rank_needs_no_process_group():
    tree = Tree(everything().blocks)
    model = TreeModule(tree)
    store = pypar.zero(model, Mesh(), stage=3)
    plain = TreeModule(tree)
    assert torch.equal(tree.loss(model, 0, 0, 0), tree.loss(plain, 0, 0, 0))
    assert isinstance(store.parameters()[0], nn.Parameter)
