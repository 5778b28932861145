"""The dynamic loss scale: a run's, and a script's, which is torch.amp.GradScaler for several ranks."""

import math
import random

import pytest
import torch

import pypar
from pypar.mesh import Axis, Mesh
from pypar.optimizers.config import LossScaleConfig
from pypar.optimizers.loss_scale import LossScale


def scaled(optimizer, weight, scaler, overflow):
    """One step of a scaler; whether the weight has moved."""
    before = weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(weight.sum() * (math.inf if overflow else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return not torch.equal(before, weight)


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_the_scale_of_a_run_and_of_a_script_are_torchs_with_hysteresis(hysteresis):
    """200 steps of a schedule in which overflows come in bursts."""
    config = LossScaleConfig(initial=1024.0, growth_interval=4, hysteresis=hysteresis, least=2.0**-60)
    run = LossScale(config)
    options = {"device": "cpu", "init_scale": 1024.0, "growth_interval": 4}
    ours = pypar.GradScaler(**options, hysteresis=hysteresis)
    torchs = torch.amp.GradScaler(**options)
    draw = random.Random(3)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=0.1) for w in weights]
    for step in range(200):
        overflow = draw.random() < (0.6 if step // 20 % 2 else 0.1)
        run.update(overflowed=overflow)
        assert scaled(optimizers[0], weights[0], ours, overflow) is not overflow
        assert ours.get_scale() == run.value
        if hysteresis == 1:
            scaled(optimizers[1], weights[1], torchs, overflow)
            assert torchs.get_scale() == run.value
        if step == 100:
            kept = ours.state_dict()
            ours = pypar.GradScaler(**options, hysteresis=hysteresis)
            ours.load_state_dict(kept)
            again = LossScale(config)
            again.load(run.state())
            run = again
    assert torch.equal(*weights) or hysteresis > 1


def test_a_scale_below_the_least_and_a_state_that_is_none_are_refused():
    scale = LossScale(LossScaleConfig(initial=4.0, hysteresis=1, least=2.0))
    scale.update(overflowed=True)
    with pytest.raises(
        RuntimeError, match=r"loss scale of 2, and half of it is below loss_scale.least \(2\)"
    ):
        scale.update(overflowed=True)
    assert scale.value == 2.0
    for state in (7, {}, {"value": 2, "good_steps": 0, "spare": 1}, {"value": math.nan, "good_steps": 0, "spare": 1},
                  {"value": 2.0, "good_steps": -1, "spare": 1}):  # fmt: skip
        with pytest.raises(ValueError, match="the checkpoint's loss_scale is not one"):
            scale.load(state)
    with pytest.raises(ValueError, match=r"hysteresis \(0\) must be at least 1"):
        pypar.GradScaler(hysteresis=0)
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler, optimizer = pypar.GradScaler(device="cpu"), torch.optim.SGD([half])
    scaler.scale(half.sum()).backward()
    with pytest.raises(ValueError, match="gradients are fp16, and unscaled ones would be lost"):
        scaler.step(optimizer)


def run_scaler(make_of_optimizer: str):
    """Ranks whose models differ, as stages do: (moved, scale) of steps of which one overflows on rank 1 alone."""
    mesh = Mesh(pp=2)
    rank = mesh.pp.rank
    weight = torch.nn.Parameter(torch.ones(3 + rank))
    unused = torch.nn.Parameter(torch.ones(2))
    kind = pypar.AdamW if make_of_optimizer == "pypar" else torch.optim.SGD
    optimizer = kind([unused] if rank == 0 and make_of_optimizer == "none here" else [weight], lr=0.1)
    scaler = pypar.GradScaler(mesh.world, "cpu", init_scale=8.0)
    found = []
    for step in range(3):
        found.append((scaled(optimizer, weight, scaler, step == 1 and rank == 1), scaler.get_scale()))
    return found


@pytest.mark.parametrize("kind", ["torch", "pypar", "none here"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks, kind):
    moves = [[(True, 8.0), (False, 4.0), (True, 4.0)]] * 2
    if kind == "none here":  # a rank without gradients learns of the others'
        moves[0] = [(False, 8.0), (False, 4.0), (False, 4.0)]
    assert ranks(2, run_scaler, kind) == moves


def test_a_group_of_one_needs_no_process_group():
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = pypar.GradScaler(Axis.single("one"), "cpu")
    assert scaled(pypar.AdamW([weight]), weight, scaler, False)
