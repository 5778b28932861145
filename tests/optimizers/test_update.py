"""Optimizers over fp32 masters: the update, clipping, what a checkpoint holds, the learning rate."""

import pytest
import torch

from pypar.data_parallel.replicated import Replicated
from pypar.mesh import Mesh
from pypar.optimizers.config import OptimizerConfig
from pypar.optimizers.learning_rate import learning_rate
from pypar.optimizers.registry import OPTIMIZERS
from pypar.optimizers.update import Optimizer


def _made(dtype, config):
    torch.manual_seed(0)
    parameters = {
        "matrix": torch.nn.Parameter(torch.randn(3, 5).to(dtype)),
        "vector": torch.nn.Parameter(torch.randn(7).to(dtype)),
    }
    store = Replicated(parameters.items(), Mesh(), bucket_bytes=64)
    return parameters, store, Optimizer(store.owned(), config)


def _steps(optimizer, store, steps):
    for step in steps:
        torch.manual_seed(100 + step)
        for owned in store.owned():
            owned.gradient.copy_(torch.randn(owned.gradient.shape))
        norm = float(torch.cat([owned.gradient.flatten() for owned in store.owned()]).norm())
        optimizer.step(1e-2, norm)
        store.publish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs_on_masters_with_clipping_and_decay_of_matrices(dtype):
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.3)
    parameters, store, optimizer = _made(dtype, config)
    plain = [p.detach().float().clone() for p in parameters.values()]
    groups = [{"params": plain[:1], "weight_decay": 0.3}, {"params": plain[1:], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps)
    _steps(optimizer, store, range(3))
    for step in range(3):
        torch.manual_seed(100 + step)
        for tensor in plain:
            tensor.grad = torch.randn(tensor.shape)
        torch.nn.utils.clip_grad_norm_(plain, 0.5)
        torchs.step()
    for tensor, parameter in zip(plain, parameters.values(), strict=True):
        torch.testing.assert_close(parameter.detach(), tensor.to(dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_its_state_changes_no_bit(name):
    config = OptimizerConfig(name=name)
    parameters, store, optimizer = _made(torch.bfloat16, config)
    _steps(optimizer, store, range(2))
    saved = {key: tensor.clone() for key, (tensor, _) in optimizer.state().items()}
    _steps(optimizer, store, range(2, 4))

    others, other_store, other = _made(torch.bfloat16, config)
    for key, (tensor, layout) in other.state().items():
        assert tuple(tensor.shape) == layout.global_shape
        tensor.copy_(saved[key])
    other.loaded(2)
    other_store.publish()
    _steps(other, other_store, range(2, 4))
    for key, (tensor, _) in other.state().items():
        assert torch.equal(tensor, optimizer.state()[key][0]), key
    for key, parameter in others.items():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, parameters[key]), key


def test_a_name_that_is_no_optimizers():
    with pytest.raises(ValueError, match="unknown optimizer 'adam', known are adamw.*; did you mean 'adamw'"):
        _made(torch.float32, OptimizerConfig(name="adam"))


def test_the_rate_rises_and_falls_to_its_share():
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.2, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.6) and rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(100, 12, config) == pytest.approx(0.2)
