"""Roles about other axes than tp: a plan's axes are found in its roles, and nothing else has to know them."""

from dataclasses import replace

import pytest

import pypar
from pypar.layout import layout_of
from pypar.mesh import Mesh
from pypar.parallel.roles import ROLES
from pypar.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.harness.samples import relative
from tests.parallel.test_trial import Model, example

PLAN = {"*.[qkv]": "into_rows", "*.out": "out_of_rows", "up": "into_rows", "down": "out_of_rows"}


def _linear(layer):
    def make(match, spreading):
        old, axis = match.module, spreading.axis(ROLES[match.role])
        return layer(
            old.in_features, old.out_features, axis, bias=True, dtype=old.weight.dtype, device="meta"
        )

    return make


def _register(monkeypatch):
    for name, model, layer in (
        ("into_rows", "column", ColumnParallelLinear),
        ("out_of_rows", "row", RowParallelLinear),
    ):
        new = replace(ROLES[model], axes=("row",), replace=_linear(layer), of_parameters=False, join=None)
        monkeypatch.setitem(ROLES, name, new)


def run_over_a_refinement():
    mesh = Mesh(tp=4, split={"tp": {"row": 2, "column": 2}})
    whole, model, x = Model(), Model(), example()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _register(monkeypatch)
        pypar.parallelize(model, mesh, PLAN, verify=(x,))
    layout = layout_of(model.up.weight)
    assert layout.axes == ("row",) and model.attention.num_heads == 2
    expected, actual = whole.eval()(x), model.eval()(x)
    expected.square().mean().backward()
    actual.square().mean().backward()
    return relative(actual, expected), relative(model.norm.weight.grad, whole.norm.weight.grad)


def test_a_plan_cuts_over_the_axes_of_its_roles(ranks):
    for errors in ranks(4, run_over_a_refinement):
        assert max(errors) < 1e-5


def run_over_two():
    with pytest.MonkeyPatch.context() as monkeypatch:
        _register(monkeypatch)
        mesh = Mesh(tp=2, split={"tp": {"row": 2, "column": 1}})
        with pytest.raises(ValueError) as refused:
            pypar.parallelize(Model(), mesh, {**PLAN, "up": "column", "down": "row"}, verify=False)
    return str(refused.value)


def test_a_plan_that_cuts_over_several_axes_is_refused(ranks):
    for message in ranks(2, run_over_two):
        assert message == (
            "the plan cuts attention.q over row and up over tp; cut the layers of a model over the same axes"
        )
