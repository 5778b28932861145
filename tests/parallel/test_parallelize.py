"""pypar.parallelize: a model written for one device, on the tp axis, has the same loss and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pypar
from pypar.layout import layout_of, local_part, local_shape, local_tensor
from pypar.mesh import Mesh
from pypar.parallel import USUAL_PLAN, ParallelPlan
from pypar.parallel.roles import ROLES
from pypar.parallel.rules import read_plan
from pypar.role import Role, Spreading, unchanged
from pypar.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.harness.samples import relative

# ---- models and plans of the user's own


class Attention(nn.Module):
    """As people write it: the number of heads is an attribute, and the head size follows from it."""

    def __init__(self, width=24, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            f(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        return self.out(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(12, 24)
        self.positions = nn.Embedding(8, 24)
        self.attention = Attention(**options)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 20), nn.Linear(20, 24, bias=False)
        self.up.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = x + self.attention(x)
        return x + self.down(functional.gelu(self.up(self.norm(x))))


PLAN = {
    "attention.[qkv]*": "column",
    "attention.out": "row",
    "*.up": "column",
    "*.down": "row",
    "tokens": "vocab",
}


def run_own_model(world_size):
    mesh = Mesh(tp=world_size)
    ids = torch.randint(12, (2, 5), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    expected, model = Model(), pypar.parallelize(Model(), mesh, PLAN)
    for m in (expected, model):
        (m(ids) * weights).sum().backward()
    assert relative(model(ids), expected(ids)) < 1e-6
    for p, whole in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.requires_grad == whole.requires_grad
        assert p.shape == whole.shape and tuple(local_tensor(p).shape) == local_shape(layout_of(p), mesh)
        if p.requires_grad:
            torch.testing.assert_close(
                local_tensor(p.grad), local_part(whole.grad, layout_of(p), mesh), rtol=1e-5, atol=1e-5
            )
    assert isinstance(model.down, RowParallelLinear if world_size > 1 else nn.Linear)
    assert isinstance(model.positions, nn.Embedding)
    return model.attention.num_heads


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_own_model_with_a_plan_and_heads_as_an_attribute(ranks, world_size):
    """A view with the whole model's num_heads would silently make heads of half the size."""
    assert ranks(world_size, run_own_model, world_size) == [4 // world_size] * world_size


def run_gathered():
    """Column-parallel layers whose outputs are gathered, and a row-parallel one that takes its part of the whole."""
    mesh, ids = Mesh(tp=2), torch.arange(10).view(2, 5) % 12
    plan = {"attention.[qkv]*": "column_gather", "*.up": "column_gather", "*.down": "row_split", **USUAL_PLAN}
    plan |= {"attention.out": "row_split"}
    expected, model = Model(), pypar.parallelize(Model(), mesh, plan, verify=(ids,))
    for m in (expected, model):
        m(ids).pow(2).sum().backward()
    assert model.attention.num_heads == 4  # each rank has them all
    for p, whole in zip(model.parameters(), expected.parameters(), strict=True):
        if p.requires_grad:
            part = local_part(whole.grad, layout_of(p), mesh)
            torch.testing.assert_close(local_tensor(p.grad), part, rtol=1e-5, atol=1e-5)
    return [bool(layout_of(m.weight).cuts) for m in (model.up, model.down, model.attention.out)]


def test_gathered_outputs_and_split_inputs(ranks):
    assert ranks(2, run_gathered) == [[True, True, True]] * 2


def run_shapes_alone():
    """On the meta device there are no numbers to compare, and shapes still tell."""
    with torch.device("meta"):
        right, wrong = Model(), Model()
    wrong.attention.key = nn.Linear(24, 24, device="meta")
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(wrong, Mesh(tp=2), {"*.query": "column", "*.out": "row"}, verify=(ids,))
    assert type(wrong.attention.query) is nn.Linear and wrong.attention.num_heads == 4
    pypar.parallelize(right, Mesh(tp=2), PLAN, verify=False)
    return str(caught.value)


def test_shapes_are_tried_without_data(ranks):
    for message in ranks(2, run_shapes_alone):
        assert "this Model, cut over tp, does not run: in attention RuntimeError" in message
        assert 'put "attention.*": "whole" in front of the plan' in message


def run_shared_module():
    model = nn.ModuleDict({"one": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    model["two"] = model["one"]
    pypar.parallelize(model, Mesh(tp=2), {"one": "column", "down": "row"})
    return model["two"] is model["one"] and isinstance(model["two"], ColumnParallelLinear)


def test_a_module_used_in_two_places_is_swapped_in_both(ranks):
    torch.manual_seed(0)
    assert all(ranks(2, run_shared_module))


def run_different_weights(sizes):
    mesh = Mesh(**sizes)
    model = Model()
    with torch.no_grad():
        model.norm.bias[3] += (mesh.world.rank == mesh.world.size - 1) * 1e-6
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, mesh, PLAN)
    assert type(model.up) is nn.Linear
    return str(caught.value)


@pytest.mark.parametrize("axis_name", ["tp", "data"])
def test_ranks_with_different_weights_are_refused(ranks, axis_name):
    for message in ranks(2, run_different_weights, {"dp" if axis_name == "data" else axis_name: 2}):
        assert f"on axis {axis_name!r} norm.bias differs" in message and "torch.manual_seed" in message


def test_a_rank_whose_own_axes_agree_refuses_with_the_others(ranks):
    """It went on to the trial, and waited there."""
    found = ranks(4, run_different_weights, {"dp": 2, "tp": 2})
    said = [
        "other ranks differ",
        "on axis 'data' norm.bias",
        "on axis 'tp' norm.bias",
        "on axis 'tp' norm.bias",
    ]
    assert all(what in message for what, message in zip(said, found, strict=True))


# ---- refusals: one sentence, and the model is as it was


def build(what):
    model = Model(num_heads=3) if what == "heads" else Model()
    if what == "shared weight":
        model.head = nn.Linear(24, 12, bias=False)
        model.head.weight = model.tokens.weight
    elif what == "subclass":
        model.up = type("ScaledLinear", (nn.Linear,), {})(24, 20)
    elif what == "hooks":
        model.up.register_forward_hook(lambda *_: None)
    elif what == "gradient hooks":
        model.down.weight.register_post_accumulate_grad_hook(lambda p: None)
    elif what == "max_norm":
        model.tokens.max_norm = 1.0
    elif what == "width":
        model.up, model.down = nn.Linear(24, 21), nn.Linear(21, 24)
    elif what == "vocabulary":
        model.tokens = nn.Embedding(13, 24)
    return model


PLANS = {
    "role": {"*.up": "colunm"},
    "typing error": {"*.upp": "column"},
    "kind": {"tokens": "column"},
    "empty": {},
    "nothing": USUAL_PLAN,
    "usual": None,
}
REFUSALS = {
    "heads": "num_heads (3) of attention must divide by the tp size (2); use a tp size of 1 or 3",
    "width": "out_features of up (21) must divide by the tp size (2); use 20 or 22",
    "vocabulary": "num_embeddings of tokens (13) must divide by the tp size (2); use 12 or 14",
    "shared weight": "head and tokens share one weight",
    "subclass": "up is a ScaledLinear, which may compute more than nn.Linear",
    "hooks": "up has hooks",
    "gradient hooks": "down has hooks",
    "nothing": "the plan cuts nothing of this Model",
    "max_norm": "tokens uses one of max_norm",
    "role": "unknown role 'colunm'; did you mean 'column'",
    "typing error": "'*.upp' matches no module; did you mean 'up'?",
    "kind": "tokens is a Embedding, which cannot be 'column'; use one of: vocab",
    "empty": "the plan is empty",
    "usual": "attention.query, attention.key, attention.value, attention.out, up, down. Give a plan",
}


def run_refused(what):
    model = build(what)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, Mesh(tp=2), PLANS.get(what, PLAN))
    assert [type(m) for m in model.modules()] == kinds and model.attention.num_heads in (3, 4)
    return str(caught.value)


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_cut_is_refused(ranks, what):
    for message in ranks(2, run_refused, what):
        assert REFUSALS[what] in message


def test_a_role_may_take_layers_that_are_neither_linear_nor_an_embedding(monkeypatch):
    monkeypatch.setitem(ROLES, "channels", Role(nn.Conv1d, ("tp",), unchanged))
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Linear(2, 2))
    reading = read_plan(ParallelPlan({"0": "channels"}), Spreading(model, None))
    assert [(match.name, match.role) for match in reading.matches] == [("0", "channels")]


def run_refused_twice():
    mesh = Mesh(tp=2)
    model = pypar.parallelize(Model(), mesh, PLAN)
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, mesh, PLAN)
    return str(caught.value)


def test_a_second_call_is_refused(ranks):
    assert all("tensor-parallel layers already" in message for message in ranks(2, run_refused_twice))
