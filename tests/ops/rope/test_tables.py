"""The tables of rope against those of transformers: the same bits, for each kind of scaling."""

import pytest
import torch

from pypar.ops.rope import rope_frequencies, rope_tables

H, POSITIONS, ORIGINAL = 48, 4096, 1024
BASE = {"rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(H // 2)],
    "long_factor": [1.5 + 0.1 * i for i in range(H // 2)],
    "original_max_position_embeddings": ORIGINAL,
}
PARTIAL = {"partial_rotary_factor": 0.5}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear partial": {"rope_type": "linear", "factor": 3.0, **PARTIAL},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn of GPT-OSS": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False},
    "yarn of DeepSeek": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn whose factor is of the lengths": {**YARN, "factor": None},
    "yarn with an attention factor": {**YARN, "attention_factor": 1.25},
    "yarn whose range is one pair": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "longrope with factors": {**LONGROPE, "factor": 32.0, "attention_factor": 1.1},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
}


def of_transformers(parameters, length):
    """(inverse frequencies, attention factor) by ROPE_INIT_FUNCTIONS, and Llama's for the plain kind."""
    pytest.importorskip("transformers", "5.0")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * H,
        num_attention_heads=4,
        head_dim=H,
        max_position_embeddings=POSITIONS,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        embedding = LlamaRotaryEmbedding(config)
        return embedding.inv_freq, embedding.attention_scaling
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)


@pytest.mark.parametrize("length", [None, 100, 3 * POSITIONS])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind, length):
    parameters = BASE | KINDS[kind]
    expected, expected_factor = of_transformers(parameters, length)
    found, factor = rope_frequencies(parameters, H, length=length, max_position_embeddings=POSITIONS)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    assert factor == expected_factor


@pytest.mark.parametrize("kind", ["default", "yarn", "longrope"])
def test_tables_are_those_of_a_model(kind):
    pytest.importorskip("transformers", "5.0")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = BASE | KINDS[kind]
    config = LlamaConfig(
        hidden_size=4 * H,
        num_attention_heads=4,
        head_dim=H,
        max_position_embeddings=POSITIONS,
        rope_parameters=dict(parameters),
    )
    positions = torch.arange(5, 77).expand(2, -1)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    found = rope_tables(parameters, H, positions, max_position_embeddings=POSITIONS)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs[..., : H // 2])


def test_a_number_of_positions_is_a_length_too():
    options = {"max_position_embeddings": POSITIONS}
    counted = rope_tables(BASE | LONGROPE, H, 2 * ORIGINAL, **options)
    said = rope_tables(BASE | LONGROPE, H, torch.arange(2 * ORIGINAL), length=2 * ORIGINAL, **options)
    short = rope_tables(BASE | LONGROPE, H, torch.arange(2 * ORIGINAL), length=ORIGINAL, **options)
    assert torch.equal(counted[0], said[0]) and not torch.equal(counted[0], short[0])


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"rope_type": "yarm", **BASE}, "unknown rope_type 'yarm'.* did you mean 'yarn'"),
        ({"rope_type": "linear", "factor": 2.0}, "needs 'rope_theta'"),
        ({"rope_type": "linear", **BASE}, "'linear' needs 'factor'"),
        ({"rope_type": "dynamic", "factor": 2.0, **BASE}, "'dynamic' needs max_position_embeddings"),
        ({**LLAMA3, **BASE, "low_freq_factor": None}, "needs 'low_freq_factor'"),
        (
            {**LONGROPE, **BASE, "factor": 2.0, "short_factor": [1.0]},
            "short_factor has 1 numbers .* R/2 = 24",
        ),
    ],
)
def test_parameters_that_lack_something_are_named(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        rope_frequencies(parameters, H)
