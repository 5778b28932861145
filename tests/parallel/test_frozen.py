"""Parameters that are frozen when a model is spread, and trained later: their gradients are whole, or refused."""

import pytest
import torch
from torch import nn

import pypar
from pypar.layout import layout_of
from pypar.mesh import Mesh
from pypar.parallel import ParallelPlan
from tests.harness.samples import relative
from tests.parallel.test_trial import PLAN, Model, example


def _gradient(model: nn.Module, parameter: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    parameter.requires_grad_(True)
    model.eval()(x).square().mean().backward()
    assert parameter.grad is not None
    return parameter.grad


def run_declared(verify):
    whole, model, x = Model("norm for any head"), Model("norm for any head"), example()
    model.attention.norm.requires_grad_(False)
    pypar.parallelize(
        model, Mesh(tp=2), {**PLAN, "attention.norm": "per_head"}, verify=(x,) if verify else False
    )
    weight = model.attention.norm.weight
    assert not weight.requires_grad and layout_of(weight).sum_over == ("dp", "cp", "tp")
    expected = _gradient(whole, whole.attention.norm.weight, x)
    return relative(_gradient(model, weight, x), expected)


@pytest.mark.parametrize("verify", [False, True])
def test_what_the_plan_declares_is_summed(ranks, verify):
    assert max(ranks(2, run_declared, verify)) < 1e-5


def run_undeclared():
    model, x = Model("norm for any head"), example()
    model.attention.norm.requires_grad_(False)
    pypar.parallelize(model, Mesh(tp=2), PLAN, verify=(x,))
    model.eval()(x).sum().backward()  # as long as it is frozen, nothing is wrong
    with pytest.raises(ValueError) as refused:
        _gradient(model, model.attention.norm.weight, x)
    return str(refused.value)


def test_what_nobody_measured_is_refused(ranks):
    for message in ranks(2, run_undeclared):
        assert message == (
            "attention.norm.weight was frozen when this Model was spread over ranks, so that nobody measured whether a "
            "rank has its whole gradient; call requires_grad_(True) before pypar.parallelize"
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def run_norm():
    mesh = Mesh(tp=2)
    whole, model, x = Block(), Block(), torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    for frozen in (model.norm, model.down):
        frozen.requires_grad_(False)
    plan = ParallelPlan({"norm": "norm", "up": "column", "down": "row"}, sequence_parallel=True)
    pypar.parallelize(model, mesh, plan, verify=False)
    whole(x).square().sum().backward()
    for frozen in (model.norm, model.down):
        frozen.requires_grad_(True)
    model(x.chunk(2, 1)[mesh.tp.rank]).square().sum().backward()
    return [
        relative(part.grad, all_.grad)
        for part, all_ in ((model.norm.weight, whole.norm.weight), (model.down.bias, whole.down.bias))
    ]


def test_a_norm_and_a_bias_under_sequence_parallelism_are_summed(ranks):
    assert max(max(errors) for errors in ranks(2, run_norm)) < 1e-5
