"""Column layers over one input share their communication, and find out by themselves where they have not one input."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pypar
from pypar.mesh import Mesh
from pypar.tensor_parallel import ColumnParallelLinear
from tests.harness.samples import draw, relative

PLAN = {"*.q": "column", "*.k": "column", "*.v": "column", "*.out": "row"}
D = 8


class Attention(nn.Module):
    """Query from x, key and value from ``memory``, x itself where there is none; ``skips``: v is not called."""

    def __init__(self, skips=False):
        super().__init__()
        self.skips = skips
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k = self.q(x), self.k(memory)
        v = k if self.skips else self.v(memory)
        return self.out(q * torch.tanh(k) + v)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(**options)

    def forward(self, *inputs):
        return self.attention(*inputs)


def _cut(mesh, **options):
    return pypar.parallelize(Model(**options), mesh, PLAN, verify=False)


def _step(model, mesh, *inputs):
    """Gradients of the inputs and what the step sent."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    mesh.tp.traffic.reset()
    out = model(*inputs)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs)], dict(mesh.tp.traffic.calls)


def run_one_input():
    mesh, x = Mesh(tp=2), draw(2, 3, D, seed=1)
    expected, _ = _step(Model(), mesh, x)
    model = _cut(mesh)
    found = [_step(model, mesh, x) for _ in range(2)]
    for results, calls in found:
        assert calls == {"all_reduce": 2}  # of the row's output, and of all three input gradients together
        assert max(map(relative, results, expected)) < 1e-6
    with torch.no_grad():  # another kind of call in between
        torch.testing.assert_close(model(x), expected[0])
    for made in (copy.deepcopy(model), model):
        results, calls = _step(made, mesh, x)
        assert calls == {"all_reduce": 2} and max(map(relative, results, expected)) < 1e-6
    layers = [m for m in copy.deepcopy(model).modules() if isinstance(m, ColumnParallelLinear)]
    assert len({id(layer.unit) for layer in layers}) == 1 and layers[0].unit is not model.attention.q.unit
    with pytest.raises(ValueError, match="not pickled"):
        pickle.dumps(model)


def test_layers_over_one_input_are_summed_together(ranks):
    ranks(2, run_one_input)


def run_other_inputs():
    mesh, x, memory = Mesh(tp=2), draw(2, 3, D, seed=1), draw(2, 3, D, seed=2)
    for options, inputs in (({}, (x, memory)), ({"skips": True}, (x,))):
        expected, _ = _step(Model(**options), mesh, *inputs)
        model = _cut(mesh, **options)
        for _ in range(4):
            results, calls = _step(model, mesh, *inputs)
            assert max(map(relative, results, expected)) < 1e-6
        assert model.attention.q.unit is None
        assert calls["all_reduce"] == 1 + 3 - len(options)  # each for itself


def test_layers_with_other_inputs_compute_for_themselves(ranks):
    ranks(2, run_other_inputs)


def run_changed_input():
    """The same tensor with other values is another input."""
    mesh, x = Mesh(tp=2), draw(2, 3, D, seed=1)
    whole, model = Model().attention, _cut(mesh).attention
    with torch.no_grad():
        for made in (whole, model):
            y = x.clone()
            made.first = made.q(y)
            y.add_(1)
            made.second = made.k(y)
        torch.testing.assert_close(model.second, whole.second.chunk(2, -1)[mesh.tp.rank])


def test_an_input_that_was_changed_is_another_one(ranks):
    ranks(2, run_changed_input)


def run_recomputed():
    """A recomputation stops early, at the last tensor that backward needs, and the unit stays."""
    mesh, x = Mesh(tp=2), draw(2, 3, D, seed=1)
    expected, _ = _step(Model(), mesh, x)
    model = _cut(mesh)

    def recomputed(x):
        return checkpoint(model, x, use_reentrant=False)

    for _ in range(3):
        results, _ = _step(recomputed, mesh, x)
        assert max(map(relative, results, expected)) < 1e-6
    assert model.attention.q.unit is not None


def test_a_unit_outlives_recomputation(ranks):
    ranks(2, run_recomputed)


def run_autocast():
    mesh, x = Mesh(tp=2), draw(2, 3, D, seed=1)
    attention = _cut(mesh).attention
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.q(x).dtype == torch.bfloat16
    assert attention.k(x).dtype == torch.float32


def test_another_dtype_of_autocast_is_another_call(ranks):
    ranks(2, run_autocast)
