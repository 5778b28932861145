"""Checkpoints, copies and averages of a model that is cut, by torch's own functions."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

import pypar
from pypar.mesh import Mesh
from pypar.sharded import Sharded
from tests.sharded.cases import PLAN, assert_same, backward, full, make, pair

FULL = StateDictOptions(full_state_dict=True)


def trained(model, num_steps=2, seed=0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, num_steps, seed)
    return optimizer


def train(model, optimizer, num_steps=2, seed=0):
    for step in range(num_steps):
        optimizer.zero_grad()
        backward(model, seed + step)
        optimizer.step()


# ---- state_dict


def run_state_dict():
    whole, cut = pair()
    state = cut.state_dict()
    assert list(state) == list(whole.state_dict())
    for name, value in whole.state_dict().items():
        assert state[name].shape == value.shape and torch.equal(full(state[name]), value)
        assert isinstance(state[name], DTensor) == isinstance(cut.get_parameter(name), Sharded)
    other = make(seed=5)
    cut.load_state_dict(other.state_dict())  # whole
    assert_same(cut, other, 0, 0)
    cut.load_state_dict(state)  # a view of the model itself
    ours = {name: value.clone() for name, value in state.items()}
    cut.load_state_dict(make(seed=6).state_dict(), assign=True)
    assert_same(cut, make(seed=6), 0, 0)
    assert [isinstance(p, Sharded) for p in cut.parameters()].count(True) == 5
    cut.load_state_dict(ours)  # DTensors
    assert_same(cut, other, 0, 0)
    cut(torch.arange(4)).sum().backward()
    part = {"up.weight": torch.ones(8, 8)}
    with pytest.raises(RuntimeError, match="size mismatch for up.weight"):
        cut.load_state_dict(part, strict=False)


def test_state_dict_is_whole_and_loads_whole_and_cut(ranks):
    ranks(2, run_state_dict)


def run_checkpoint(folder):
    """Model and optimizer, from tp=2 into another tp=2 and, in one process, into the whole model."""
    whole, cut = pair()
    expected, optimizer = trained(whole), trained(cut)
    state = {"model": get_model_state_dict(cut), "optimizer": get_optimizer_state_dict(cut, optimizer)}
    assert isinstance(state["optimizer"]["state"]["up.weight"]["exp_avg"], DTensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)
        dcp.save(dict(cut.named_parameters()), checkpoint_id=f"{folder}/direct")
        _, again = pair(seed=9)
        again.zero_grad()  # where there are gradients torch makes no states to load into
        other = torch.optim.AdamW(again.parameters(), lr=0.01)
        loaded = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, other)}
        dcp.load(loaded, checkpoint_id=folder)
        set_model_state_dict(again, loaded["model"])
        set_optimizer_state_dict(again, other, loaded["optimizer"])
        assert_same(again, cut, 0, 0)
        direct = {name: torch.zeros_like(p) for name, p in cut.named_parameters()}
        dcp.load(direct, checkpoint_id=f"{folder}/direct")
        assert_same(list(direct.values()), list(cut.parameters()), 0, 0)
    for model, its in ((whole, expected), (cut, optimizer), (again, other)):
        train(model, its, seed=4)
    assert_same(again, cut, 0, 0)
    assert_same(again, whole, 1e-4, 1e-5)
    return [p.detach() for p in whole.parameters()]


def test_checkpoints_of_model_and_optimizer(ranks, tmp_path):
    after = ranks(2, run_checkpoint, str(tmp_path))[0]
    model = make(seed=3)  # in this process, whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.load(loaded, checkpoint_id=str(tmp_path))
        set_model_state_dict(model, loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
    train(model, optimizer, seed=4)
    assert_same(list(model.parameters()), after, 1e-4, 1e-5)


def run_full_state():
    whole, cut = pair()
    expected, optimizer = trained(whole), trained(cut)
    model_state = get_model_state_dict(cut, options=FULL)
    state = get_optimizer_state_dict(cut, optimizer, options=FULL)
    theirs = get_optimizer_state_dict(whole, expected)
    for name, parameter in whole.named_parameters():
        assert type(model_state[name]) is torch.Tensor and model_state[name].shape == parameter.shape
        torch.testing.assert_close(model_state[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        for key, value in theirs["state"][name].items():
            assert type(state["state"][name][key]) is torch.Tensor
            torch.testing.assert_close(state["state"][name][key], value, rtol=1e-4, atol=1e-5)
    _, again = pair(seed=9)
    other = torch.optim.AdamW(again.parameters(), lr=0.01)
    again.zero_grad()
    set_model_state_dict(again, model_state, options=FULL)
    set_optimizer_state_dict(again, other, copy.deepcopy(state), options=FULL)
    for model, its in ((cut, optimizer), (again, other)):
        train(model, its, seed=4)
    assert_same(again, cut, 0, 0)


def test_full_state_dicts(ranks):
    ranks(2, run_full_state)


def run_optimizer_state(kind):
    """optimizer.load_state_dict of what another one gave, before any step."""
    whole, cut = pair()
    expected, optimizer = trained(whole), trained(cut)
    _, again = pair(seed=9)
    again.load_state_dict(cut.state_dict())
    other = torch.optim.AdamW(again.parameters(), lr=0.5)
    other.load_state_dict((expected if kind == "whole" else optimizer).state_dict())
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    for model, its in ((whole, expected), (cut, optimizer), (again, other)):
        train(model, its, seed=4)
    assert all(type(s["exp_avg"]) is type(p.detach()) for p, s in other.state.items())
    assert_same(again, cut, 1e-4, 1e-5)
    assert_same(again, whole, 1e-4, 1e-5)


@pytest.mark.parametrize("kind", ["whole", "cut"])
def test_optimizer_states_load_whole_and_cut(ranks, kind):
    ranks(2, run_optimizer_state, kind)


# ---- averages and copies


def run_averages():
    whole, cut = pair()
    for model in (whole, cut):
        model.averages = [
            torch.optim.swa_utils.AveragedModel(model),
            torch.optim.swa_utils.AveragedModel(
                model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
            ),
            {name: value.clone() for name, value in model.state_dict().items()},
            [p.detach().clone() for p in model.parameters()],
        ]
        optimizer = torch.optim.SGD(list(model.up.parameters()) + list(model.tokens.parameters()), lr=0.5)
        for step in range(3):
            train(model, optimizer, 1, step)
            model.averages[0].update_parameters(model)
            model.averages[1].update_parameters(model)
            for name, value in model.state_dict().items():
                if name in model.averages[2]:
                    model.averages[2][name].mul_(0.9).add_(value, alpha=0.1)
            for average, parameter in zip(model.averages[3], model.parameters(), strict=False):
                average.lerp_(parameter.detach(), 0.1)
    for ours, theirs in zip(cut.averages, whole.averages, strict=True):
        pairs = [list(x.values()) if isinstance(x, dict) else x for x in (ours, theirs)]
        assert_same(*pairs)
    cut.load_state_dict(cut.averages[2], strict=False)
    assert torch.equal(full(cut.up.weight), full(cut.averages[2]["up.weight"]))


def test_averages_of_weights(ranks):
    ranks(2, run_averages)


def run_copies():
    whole, cut = pair()
    copied = copy.deepcopy(cut)
    assert copied.up.weight is not cut.up.weight and copied.up.weight.data_ptr() != cut.up.weight.data_ptr()
    assert isinstance(copied.up.weight, nn.Parameter) and copied.up.weight.requires_grad
    assert torch.equal(full(copied.up.weight.grad), full(cut.up.weight.grad))
    assert copied.up.weight.grad.data_ptr() != cut.up.weight.grad.data_ptr()
    for model in (copied, whole):
        trained(model)
    assert_same(copied, whole, 1e-4, 1e-5)
    assert_same(cut, make())
    with pytest.raises(ValueError, match="is not pickled, for it"):
        torch.save(cut, "/dev/null")
    with pytest.raises(ValueError, match="is not pickled, for it"):
        torch.save(cut.up.weight.grad, "/dev/null")


def test_copies(ranks):
    ranks(2, run_copies)


def run_dtypes():
    for dtype in (torch.bfloat16, torch.float64):
        whole, cut = (m.to(dtype) for m in pair())
        assert all(p.dtype == dtype == p.grad.dtype for p in cut.parameters())
        assert_same([p.grad for p in cut.parameters()], [p.grad for p in whole.parameters()], 1e-2, 1e-2)
        for model in (whole, cut):
            model.zero_grad(set_to_none=False)
            backward(model)
        assert_same([p.grad for p in cut.parameters()], [p.grad for p in whole.parameters()], 3e-2, 3e-2)
        assert [isinstance(p, Sharded) for p in cut.parameters()].count(True) == 5
    cut.requires_grad_(False)
    assert not any(p.requires_grad for p in cut.parameters())
    empty = copy.deepcopy(cut).to("meta").to_empty(device="cpu")
    assert [p.shape for p in empty.parameters()] == [p.shape for p in whole.parameters()]
    empty.load_state_dict(whole.state_dict())
    assert_same(empty, whole, 0, 0)
    assert type(empty.up.weight) is Sharded and isinstance(empty.up.weight, nn.Parameter)


def test_conversions(ranks):
    ranks(2, run_dtypes)


# ---- other tensors in a parameter's place


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale


class Transposed(nn.Module):
    def forward(self, x):
        return x.t().contiguous().t()


def run_replaced():
    whole, cut = pair()
    ids = torch.arange(6)
    for weights in (
        make(seed=4).state_dict(),
        pypar.parallelize(make(seed=4), Mesh(tp=2), PLAN).state_dict(keep_vars=True),
    ):
        out = torch.func.functional_call(cut, weights, (ids,))
        torch.testing.assert_close(out, make(seed=4)(ids))
    expected = make(seed=4)
    expected(ids).square().sum().backward()
    for model in (make(seed=4), pypar.parallelize(make(seed=4), Mesh(tp=2), PLAN)):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        torch.func.functional_call(cut, leaves, (ids,)).square().sum().backward()
        assert_same([p.grad for p in leaves.values()], [p.grad for p in expected.parameters()])
    with pytest.raises(
        ValueError, match=r"weight of ColumnParallelLinear was replaced by a plain tensor \(8, 8\)"
    ):
        torch.func.functional_call(cut, {"up.weight": torch.ones(8, 8)}, (ids,))
    for model in (whole, cut):
        model.zero_grad()
        parametrize.register_parametrization(model.up, "weight", Scaled())
        backward(model)
    assert_same([p.grad for p in cut.parameters()], [p.grad for p in whole.parameters()])
    cut.load_state_dict(whole.state_dict())
    assert_same([full(p) for p in cut.parameters()], list(whole.parameters()))
    parametrize.remove_parametrizations(cut.up, "weight")
    parametrize.remove_parametrizations(whole.up, "weight")
    assert_same([cut.up.weight], [whole.up.weight])
    with pytest.raises(ValueError, match="would mix"):
        parametrize.register_parametrization(cut.up, "weight", Transposed())
    with pytest.raises(ValueError, match="would mix"):
        nn.utils.parametrizations.spectral_norm(cut.down)


def test_functional_call_and_parametrizations(ranks):
    ranks(2, run_replaced)
