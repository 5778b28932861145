"""attn_implementation="pypar" outside of causal language models: full attention stays full, and biases learn."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    CLIPTextConfig,
    T5Config,
    T5GemmaConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

import pypar

LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
WIDTHS = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PART = USUAL | {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}


def _ids(length):
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


def _padding():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return mask


def _numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


TEXTS = {"input_ids": _ids(12), "attention_mask": _padding(), "decoder_input_ids": _ids(9)}
CASES = {
    "encoder and decoder": (BartConfig(vocab_size=64, **LAYERS, **WIDTHS), TEXTS),
    "learned biases of positions": (
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0),
        TEXTS,
    ),
    "an encoder with windows": (T5GemmaConfig(encoder=PART, decoder=PART, vocab_size=64), TEXTS),
    "images": (
        ViTConfig(**USUAL, image_size=32, patch_size=8),
        {"pixel_values": _numbers(2, 3, 32, 32)},
    ),
    "speech": (
        WhisperConfig(
            vocab_size=64, **LAYERS, **WIDTHS, num_mel_bins=8, max_source_positions=16, pad_token_id=0
        ),
        {"input_features": _numbers(2, 8, 32), "decoder_input_ids": _ids(9)},
    ),
    "speech as a wave": (
        Wav2Vec2Config(
            **USUAL, conv_dim=(16,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
        ),
        {"input_values": _numbers(2, 2000)},
    ),
    "a causal text encoder": (
        CLIPTextConfig(**USUAL, vocab_size=64, bos_token_id=1, eos_token_id=2),
        {"input_ids": _ids(12), "attention_mask": _padding()},
    ),
}


def _results(config, inputs, implementation):
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(config), attn_implementation=implementation).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = model(**inputs).last_hidden_state
    out = out[:, :8]  # not what stands in the place of padding
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_eager(name):
    pypar.register_with_transformers()
    expected = _results(*CASES[name], "eager")
    actual = _results(*CASES[name], "pypar")
    assert len(actual) == len(expected)
    largest = max(x.abs().max().item() for x in expected[1:])
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)
