"""Every causal language model of transformers with pypar's operators: loss and gradients as before, or refused."""

import copy

import pytest
import torch

import pypar
from tests.harness.transformers_sweep import KINDS, NotTinyError, tiny_model, token_ids


def _loss_and_gradients(model):
    torch.manual_seed(0)  # of dropout
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow  # test_apply_fused has the families that pypar promises
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_as_before_or_it_is_refused(kind):
    try:
        plain = tiny_model(kind, 2).train()
    except NotTinyError as reason:
        pytest.skip(f"no tiny model of {kind}: {reason}")
    fused = copy.deepcopy(plain)
    try:
        pypar.apply_fused(fused)
    except ValueError as refusal:
        assert "apply_fused knows no norm" in str(refusal)
        return
    expected, gradients = _loss_and_gradients(plain)
    loss, actual = _loss_and_gradients(fused)
    assert abs(loss - expected) < 2e-5 * abs(expected)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert actual.keys() == gradients.keys()
    for name, gradient in gradients.items():  # routers and deep recurrences multiply what rounding differs by
        assert (actual[name] - gradient).abs().max().item() <= 1e-4 * largest, name
