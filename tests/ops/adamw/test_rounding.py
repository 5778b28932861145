"""adamw's stochastic rounding to bf16."""

import pytest
import torch

from pypar.ops.adamw import Place, Update, adamw
from pypar.ops.adamw.rounding import random_words, round_by, step_key


def test_rounding_keeps_the_mean_and_small_updates():
    count = 1 << 16
    words = random_words(step_key(1, 1), Place(0, count, 0), count, torch.device("cpu"))
    x = torch.full((count,), 1.0 + 2**-9)  # a quarter of the way from 1 to the next number in bf16
    up = round_by(x, words & 0xFFFF) > 1
    assert abs(up.float().mean().item() - 0.25) < 0.01
    assert abs((round_by(x, words >> 16) > 1).float().mean().item() - 0.25) < 0.01
    exact = torch.tensor([torch.inf, -torch.inf, 1.0])
    assert torch.equal(round_by(exact, words[:3] & 0xFFFF), exact.bfloat16())
    bits = torch.stack([(words >> bit) & 1 for bit in range(32)]).float()
    assert ((bits.mean(1) - 0.5).abs() < 0.01).all()
    correlated = torch.corrcoef(torch.cat([bits, bits.roll(1, 1)])).fill_diagonal_(0)
    assert correlated.abs().max() < 0.02
    other = random_words(step_key(1, 2), Place(0, count, 0), count, torch.device("cpu"))
    assert (words == other).float().mean() < 0.001


def test_a_bf16_weight_that_rounding_to_nearest_would_freeze_moves():
    weights = {}
    for seed in (None, 4):
        state = {
            "params": [torch.ones(4096).bfloat16()],
            "gradients": [torch.ones(4096).bfloat16()],
            "exp_avgs": [torch.zeros(4096).bfloat16()],
            "exp_avg_sqs": [torch.zeros(4096).bfloat16()],
        }
        for step in range(1, 41):
            adamw(**state, update=Update(step, 1e-4, weight_decay=0.0, seed=seed))
        weights[seed] = state["params"][0].float().mean().item()
    assert weights[None] == 1 and weights[4] == pytest.approx(1 - 40e-4, abs=5e-4)
