"""What pypar.apply_fused leaves as it is, and says so; and the models that it refuses."""

import types

import pytest
import torch
from torch import nn

import pypar
from tests.harness.transformers_sweep import tiny_model


def _left(model, class_name):
    report = pypar.apply_fused(model)
    return next(line.text for line in report.left if line.class_name == class_name)


def test_what_computes_something_else_is_left():
    model = tiny_model("llama")

    class OtherNorm(type(tiny_model("gemma2").model.norm)):
        def _norm(self, x):
            return x * torch.rsqrt(x.var(-1, keepdim=True) + self.eps)

    model.model.norm = OtherNorm(64)
    assert "it computes something else: a trial differs by" in _left(model, "OtherNorm")
    assert type(model.model.norm) is OtherNorm


def test_what_somebody_has_changed_is_left():
    model = tiny_model("llama")
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, x: 2 * x, norm)
    assert "another forward has been put over" in _left(model, "LlamaRMSNorm")
    model = tiny_model("llama")
    model.loss_function = nn.functional.cross_entropy
    assert "loss_function is not ForCausalLMLoss" in _left(model, "LlamaForCausalLM")
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    assert "its lm_head is a Sequential" in _left(model, "LlamaForCausalLM")
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    assert 'experts_implementation="eager"' in _left(model, "MixtralExperts")


def test_what_pypar_does_not_know_is_named():
    model = tiny_model("llama", hidden_act="relu")
    assert "pypar has no gated ReLU" in _left(model, "LlamaMLP")
    model = tiny_model("llama")

    class UnknownRotary(nn.Module):
        def forward(self, x, position_ids):
            angles = torch.rand(1, x.shape[1], 16)
            return angles.cos(), angles.sin()

    model.model.rotary_emb = UnknownRotary()
    assert "cos and sin come from UnknownRotary" in _left(model, "LlamaAttention")


def test_a_model_of_which_nothing_is_known_is_refused():
    model = tiny_model("bloom")
    with pytest.raises(
        ValueError, match="knows no norm.* of this BloomForCausalLM.*BloomMLP.*pypar does not know"
    ):
        pypar.apply_fused(model)
    with pytest.raises(ValueError, match="of this Sequential; give a causal language model"):
        pypar.apply_fused(nn.Sequential(nn.Linear(3, 3)))
