"""What pypar.parallelize finds out by running a model: cut and right, or refused and as it was."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import pypar
from pypar.layout import layout_of, local_part, local_tensor
from pypar.mesh import Mesh
from tests.harness.samples import relative

PLAN = {"*.[qkv]": "column", "*.out": "row", "*.up": "column", "*.down": "row"}


class Attention(nn.Module):
    """kind: what stands between the projections and the heads, and makes a cut right or wrong."""

    def __init__(self, kind, num_heads=4, head_size=6):
        super().__init__()
        width = num_heads * head_size
        self.kind, self.num_heads, self.head_dim = kind, num_heads, head_size
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        if kind == "norm of all heads":
            self.norm = nn.RMSNorm(width)
        elif kind == "norm a head":
            self.norms = nn.ModuleList(nn.LayerNorm(head_size, bias=False) for _ in range(num_heads))
        elif kind == "norm for any head":
            self.norm = nn.RMSNorm(head_size)
        elif kind == "scale of a scalar":
            self.scale = nn.Parameter(torch.ones(()))
        elif kind == "scale a head":
            self.sinks = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.length = x.shape[1]
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kind == "norm of all heads":
            q = self.norm(q.transpose(1, 2).flatten(2)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        elif self.kind == "norm a head":
            q = torch.stack([norm(head) for norm, head in zip(self.norms, q.unbind(1), strict=False)], 1)
        elif self.kind == "norm for any head":
            q = self.norm(q)
        elif self.kind == "pairs":  # differential attention takes head i and head i + N/2
            one, two = v.chunk(2, 1)
            v = torch.cat((one - 0.5 * two, two), 1)
        elif self.kind == "scale of a scalar":
            q = q * self.scale
        elif self.kind == "scale a head":
            v = v * (1 + self.sinks.view(-1, 1, 1))
        elif self.kind == "one rank fails" and getattr(self.q, "axis", None) and self.q.axis.rank == 1:
            raise RuntimeError("only here")
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.norm = Attention(kind), nn.LayerNorm(24)
        self.up, self.down, self.dropout = nn.Linear(24, 20), nn.Linear(20, 24), nn.Dropout(0.3)
        if kind == "hidden behind a gate":
            self.gate = nn.Parameter(torch.zeros(()))
            self.attention.kind = "pairs"

    def forward(self, x):
        y = self.dropout(self.attention(x))
        x = x + (y * self.gate if hasattr(self, "gate") else y)
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def example(num_sequences=2):
    return torch.randn(num_sequences, 5, 24, generator=torch.Generator().manual_seed(1))


def state(model):
    """All that a refusal must leave: values, gradients, attributes, training mode, hooks and the random state."""
    parts = [(n, id(p), p.detach().clone(), p.grad) for n, p in model.named_parameters()]
    parts += [(n, id(b), b.clone(), None) for n, b in model.named_buffers()]
    modules = [
        (type(m), m.training, len(m._forward_hooks), sorted(vars(m)), getattr(m, "num_heads", None))
        for m in model.modules()
    ]
    return parts, modules, torch.get_rng_state()


def assert_same_state(before, after):
    for (name, identity, value, grad), (name2, identity2, value2, grad2) in zip(
        before[0], after[0], strict=True
    ):
        assert (name, identity) == (name2, identity2) and torch.equal(value, value2) and grad is grad2
    assert before[1] == after[1] and torch.equal(before[2], after[2])


# ---- right, and right because the gradients of shared weights are measured


RIGHT = ["plain", "norm for any head", "scale of a scalar", "scale a head"]


def run_right(kind, dtype):
    mesh = Mesh(tp=2)
    whole, model = (Model(kind).to(dtype).train() for _ in range(2))
    plan = {"*.sinks": "column", **PLAN} if kind == "scale a head" else PLAN
    before = torch.get_rng_state()
    sent = mesh.tp.traffic.snapshot()
    pypar.parallelize(model, mesh, plan, verify=(example().to(dtype),))
    assert torch.equal(torch.get_rng_state(), before) and all(m.training for m in model.modules())
    assert model.attention.seen == 0 and not hasattr(model.attention, "length")
    checked = mesh.tp.traffic.snapshot()
    assert all(p.grad is None for p in model.parameters())
    outs = []
    for m in (whole.eval(), model.eval()):
        outs.append(m(example().to(dtype)))
        outs[-1].pow(2).sum().backward()
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert relative(outs[1], outs[0]) < tolerance
    largest = max(q.grad.abs().max() for q in whole.parameters())
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        error = (local_tensor(p.grad) - local_part(q.grad, layout_of(p), mesh)).abs().max()
        assert error < tolerance * max(q.grad.abs().max(), 0.01 * largest)
    return checked.bytes_sent - sent.bytes_sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", RIGHT)
def test_a_model_that_is_right_is_cut_and_its_weights_between_column_and_row_get_whole_gradients(
    ranks, kind, dtype
):
    for bytes_sent in ranks(2, run_right, kind, dtype):
        assert bytes_sent < 200  # the check of equal weights alone: the trial is not the user's traffic


# ---- wrong, found by numbers or by shapes, and nothing has changed


WRONG = {
    "norm a head": "its outputs differ",
    "pairs": "its outputs differ",
    "norm of all heads": "does not run: in attention.norm",
    "hidden behind a gate": "first in attention (allowed 0.001)",
    "one rank fails": "does not run",
}


def run_wrong(kind):
    model = Model(kind).train()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    model.norm.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, Mesh(tp=2), PLAN, verify=(example(),))
    assert_same_state(before, state(model))
    return str(caught.value)


@pytest.mark.parametrize("kind", WRONG)
def test_a_cut_model_that_is_not_the_whole_one_is_refused_and_stays_as_it_was(ranks, kind):
    messages = ranks(2, run_wrong, kind)
    for message in messages:
        assert WRONG[kind] in message and "whole" in message
    if kind == "one rank fails":  # the other rank was in a collective, and is told
        assert "in attention RuntimeError: only here" in messages[1] and "another rank" in messages[0]


def run_partly_frozen():
    model = Model("norm for any head").requires_grad_(False)
    model.attention.norm.weight.requires_grad_(True)
    pypar.parallelize(model, Mesh(tp=2), PLAN, verify=lambda m: {"y": m(example()), "note": None})
    model(example()).pow(2).sum().backward()
    whole = Model("norm for any head")
    whole(example()).pow(2).sum().backward()
    return relative(model.attention.norm.weight.grad, whole.attention.norm.weight.grad)


def test_frozen_weights_and_a_function_that_runs_the_model(ranks):
    torch.manual_seed(0)
    assert max(ranks(2, run_partly_frozen)) < 1e-5


# ---- what is said where nothing is checked


def run_said(verify):
    model = Model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pypar.parallelize(model, Mesh(tp=2), PLAN, verify=verify)
        except ValueError as error:
            return str(error)
    return [str(w.message) for w in caught]


def test_what_was_not_checked_is_said_once(ranks):
    said, silent = ranks(2, run_said, None)
    assert (
        len(said) == 1
        and "did not compare this Model with the whole one: its inputs are not known" in said[0]
    )
    assert silent == []
    assert ranks(2, run_said, False) == [[], []]
    for message in ranks(2, run_said, True):
        assert "cannot check this Model as verify asks: its inputs are not known" in message
    for message in ranks(2, run_said, (torch.ones(2, 5, 23),)):
        assert "the whole model does not run on a few inputs (RuntimeError: " in message
    for message in ranks(2, run_said, 3):
        assert "verify is a int; give True, False, None, a tuple" in message


def run_named_inputs():
    pypar.parallelize(Model(), Mesh(tp=2), PLAN, verify={"x": example()})
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(Model("pairs"), Mesh(tp=2), PLAN, verify={"x": example()})
    return str(caught.value)


def test_named_inputs(ranks):
    assert all("differ" in message for message in ranks(2, run_named_inputs))


def run_two_data_ranks():
    mesh = Mesh(dp=2, tp=2)
    pypar.parallelize(Model(), mesh, PLAN, verify=(example(),))
    with pytest.raises(ValueError):
        pypar.parallelize(Model("pairs"), mesh, PLAN, verify=(example(),))
    model = Model("one rank fails" if mesh.dp.rank else "plain")
    with pytest.raises(ValueError, match="does not run"):  # on every rank, also where nothing failed
        pypar.parallelize(model, mesh, PLAN, verify=(example(),))
    return True


def test_all_ranks_of_a_mesh_agree(ranks):
    assert all(ranks(4, run_two_data_ranks))
