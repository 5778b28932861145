"""attn_implementation="pypar" in transformers' models gives what "eager" gives."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
)
from transformers.masking_utils import sliding_window_causal_mask_function

import pypar
from pypar.hugging_face import attention as attention_interface
from tests.harness.decoders import decoders

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = decoders(SIZES, window=8, head_dim=8) | {
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    pypar.register_with_transformers()


def models(name):
    """The same model twice: eager and pypar."""
    made = []
    for implementation in ("eager", "pypar"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation)
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                torch.nn.init.normal_(parameter)
        made.append(model.eval())
    return made


def assert_same(name, real=None, **inputs):
    """Logits (where `real`) and gradients of all weights."""
    results = []
    for model in models(name):
        logits = model(**inputs).logits
        logits = logits if real is None else logits[real]
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def tokens(batch=2, length=40):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name):
    assert_same(name, input_ids=tokens())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, slice(0, 13) if side == "left" else slice(-13, None)] = 0
    assert_same(name, real=mask.bool(), input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences(name):
    positions = torch.cat([torch.arange(11), torch.arange(17), torch.arange(12)]).expand(2, -1)
    assert_same(name, input_ids=tokens(), position_ids=positions)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation(name, cache):
    config = GenerationConfig(max_new_tokens=12, do_sample=False, cache_implementation=cache, pad_token_id=0)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    texts = [
        model.generate(tokens(length=9), attention_mask=mask, generation_config=config)
        for model in models(name)
    ]
    assert torch.equal(*texts)


def test_encoder():
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    inputs["attention_mask"][1, 30:] = 0
    results = []
    for implementation in ("eager", "pypar"):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        config._attn_implementation = implementation
        results.append(BertModel(config).eval()(**inputs).last_hidden_state)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama", marks=pytest.mark.slow),  # of the others every second layer is as its own
        "gpt-oss with sinks and window",
    ],
)
def test_the_mask_is_made_in_one_graph(name):
    _, model = models(name)
    expected = model(tokens()).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_dropout_in_training_is_used():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, attention_dropout=0.5), attn_implementation="pypar"
    ).train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["mistral with a window", "gpt-oss with sinks and window"])
def test_a_plain_window_is_passed_as_a_window(name):
    mask = attention_interface.attention_mask(
        2, 10, 10, mask_function=sliding_window_causal_mask_function(4), config=CONFIGS[name]
    )
    assert mask.pypar_window == (3, 0) and mask.shape == (2, 1, 10, 10)
    distance = torch.arange(10)[:, None] - torch.arange(10)
    seen = (distance >= 0) & (distance < 4)
    if "gpt-oss" in name:  # it runs without torch's function, so that what it does to masks may be arithmetic
        seen = torch.where(seen, 0.0, torch.finfo(mask.dtype).min)
    assert torch.equal(mask[1, 0], seen)
    assert not hasattr(mask[..., :5], "pypar_window")


def test_what_it_cannot_do_is_refused():
    _, model = models("llama")
    with pytest.raises(ValueError, match="computes no attention weights"):
        model(tokens(), output_attentions=True)
