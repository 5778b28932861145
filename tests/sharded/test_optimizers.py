"""Clipping, loss scaling and optimizers of torch on a model that is cut: the whole model's steps, or a refusal."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pypar.layout import local_tensor
from pypar.sharded import Sharded
from tests.sharded.cases import assert_same, backward, full, make, pair


def same_on_all_ranks(model):
    """The weights that every rank holds whole are the same bits."""
    for parameter in model.parameters():
        if not isinstance(parameter, Sharded):
            parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, parameter.detach())
            assert all(torch.equal(part, parts[0]) for part in parts)


# ---- clipping

CLIPPINGS = {
    "clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
    "for loop": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, foreach=False),
    "foreach": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, foreach=True),
    "inf": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.01, norm_type=math.inf),
    "norm 1": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, norm_type=1.0, error_if_nonfinite=True),
    "one parameter": lambda m: nn.utils.clip_grad_norm_(m.up.weight, 0.01),
    "in two steps": lambda m: _clip_in_two_steps(m),
    "clip_grad_value_": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01),
    "by hand": lambda m: _clip_by_hand(m),
    "each its own": lambda m: [p.grad.mul_(0.1 / (p.grad.norm() + 1e-6)) for p in m.parameters()][0].norm(),
}


def _clip_in_two_steps(model):
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)
    return norm


def _clip_by_hand(model):
    total = sum(p.grad.data.norm(2).item() ** 2 for p in model.parameters()) ** 0.5
    for parameter in model.parameters():
        parameter.grad.data.mul_(0.1 / (total + 1e-6))
    return torch.tensor(total)


def run_clipping():
    for name, clip in CLIPPINGS.items():
        whole, cut = pair()
        expected, norm = clip(whole), clip(cut)
        if expected is not None:
            assert type(norm) is torch.Tensor
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert_same([p.grad for p in cut.parameters()], [p.grad for p in whole.parameters()])


def test_clipping_is_by_the_whole_models_gradients(ranks):
    ranks(2, run_clipping)


def run_scaler(bad_rank):
    _, cut = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.1)
    optimizer.zero_grad()
    before = [full(p).clone() for p in cut.parameters()]
    scaler.scale(torch.ones(()))
    backward(cut, scale=4.0)
    if dist.get_rank() == bad_rank:
        local_tensor(cut.down.weight.grad)[0, 0] = math.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    same_on_all_ranks(cut)
    moved = any(not torch.equal(full(p), old) for p, old in zip(cut.parameters(), before, strict=True))
    whole = make()
    backward(whole)
    if moved:
        assert_same([p.grad for p in cut.parameters()], [p.grad for p in whole.parameters()])
    return moved, scaler.get_scale()


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    assert ranks(2, run_scaler, None) == [(True, 4.0)] * 2
    assert ranks(2, run_scaler, 1) == [(False, 2.0)] * 2


# ---- optimizers

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.1, "t0": 1},
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


class Lamb(torch.optim.Optimizer):
    """A user's own: the step of each parameter is scaled by norms of all of it."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 0.1)
                update = state["mean"] / (p.grad.square().mean().sqrt() + 1e-3)
                p.add_(update, alpha=-group["lr"] * (p.norm() / (update.norm() + 1e-3)).item())


def run_optimizers():
    kinds = [
        (name, {**options, "foreach": foreach})
        for name, options in OPTIMIZERS.items()
        for foreach in (True, False)
    ]
    kinds += [
        (
            name,
            {**OPTIMIZERS[name], "fused": True, "nesterov": False}
            if name == "SGD"
            else {**OPTIMIZERS[name], "fused": True},
        )
        for name in FUSED
    ]
    kinds += [(Lamb, {"lr": 0.1})]
    for name, options in kinds:
        whole, cut = pair()
        make_optimizer = name if isinstance(name, type) else getattr(torch.optim, name)
        optimizers = [make_optimizer(m.parameters(), **options) for m in (whole, cut)]
        for step in range(3):
            for model, optimizer in zip((whole, cut), optimizers, strict=True):
                optimizer.zero_grad(set_to_none=step != 1)
                backward(model, seed=step)
                backward(model, seed=step + 5)  # gradients add up
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
        assert_same(cut, whole, rtol=1e-4, atol=2e-5), (name, options)
        same_on_all_ranks(cut)


def test_optimizers_make_the_whole_models_steps(ranks):
    ranks(2, run_optimizers)


class Shampoo(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(torch.linalg.svd(p.grad).U @ p.grad)


class RowNormalised(Shampoo):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / p.grad.mean(dim=-1, keepdim=True))


class Flat(Shampoo):
    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params) - 1, params)


MATRICES = {
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.1),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), foreach=False),
    "Adafactor foreach": lambda m: torch.optim.Adafactor(m.parameters(), foreach=True),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters()),
    "svd": lambda m: Shampoo(m.parameters()),
    "rows": lambda m: RowNormalised(m.parameters()),
    "vector": lambda m: Flat(m.parameters()),
}


def run_matrices(name):
    _, cut = pair()
    optimizer = MATRICES[name](cut)
    with pytest.raises(ValueError, match="would mix the parts|mix its parts") as caught:
        optimizer.step(*([lambda: backward(cut)] if name == "LBFGS" else []))
    return str(caught.value)


@pytest.mark.parametrize("name", MATRICES)
def test_optimizers_that_need_whole_matrices_are_refused(ranks, name):
    if not hasattr(torch.optim, name.split()[0]) and name[0].isupper():
        pytest.skip(f"this torch has no {name}")
    for message in ranks(2, run_matrices, name):
        assert "full_tensor()" in message
