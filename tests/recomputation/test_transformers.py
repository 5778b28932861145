"""`pypar.recompute` on models of transformers: their layers are found, and gradients are the same bits."""

import pytest
import torch

import pypar
from pypar.recomputation.apply import recomputed
from tests.recomputation.test_recompute import assert_same

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _mixtral():
    """Its router writes into the weights of the chosen experts."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _gpt2():
    """It has dropout."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )


def _t5():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def gradients(make, policy, **options):
    torch.manual_seed(0)
    model = pypar.recompute(make(), policy).train()
    assert bool(recomputed(model)) == (policy != "none")
    ids = torch.arange(20).view(2, 10)
    torch.manual_seed(3)
    model(input_ids=ids, labels=ids, **options).loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("make", [_mixtral, _gpt2])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_gradients_are_the_same_bits(make, policy):
    assert_same(gradients(make, policy), gradients(make, "none"))


def test_a_cache_that_grows_is_an_error_that_names_the_block():
    with pytest.raises(RuntimeError, match=r"decoder.block.1 computed .* use_cache=False"):
        gradients(_t5, "full", use_cache=True)
    assert_same(gradients(_t5, "full", use_cache=False), gradients(_t5, "none", use_cache=False))


@pytest.mark.parametrize("make", [_mixtral, _gpt2])
@pytest.mark.parametrize("budget", [None, 100_000, 1_000_000])
def test_offloaded_and_planned_layers_give_the_same_bits(make, budget):
    torch.manual_seed(0)
    model = make().train()
    if budget is None:
        pypar.offload_activations(model, min_bytes=1)
    else:
        planner = pypar.plan_activations(model, budget, min_bytes=1)
    ids = torch.arange(20).view(2, 10)
    for _ in range(3):
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        assert_same([p.grad for p in model.parameters()], gradients(make, "none"))
    if budget is not None:
        assert planner.measured_bytes == planner.plan.peak_bytes <= budget
