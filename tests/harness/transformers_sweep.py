"""Every causal language model of the installed transformers, tiny and with random weights, for tests that go through
all of them.

    for kind in KINDS:
        try:
            model = tiny_model(kind)
        except NotTinyError as reason:
            ...

Knows nothing of what is tested: neither parallelism nor attention backends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 128
MAX_PARAMETERS = 20_000_000  # a model that the sizes below do not make smaller than this is left out
MAX_LAYERS = 8

# (value, names of configuration attributes that get it)
_SIZES: tuple[tuple[object, str], ...] = (
    (
        64,
        "hidden_size d_model n_embd embed_dim word_embed_proj_dim max_position_embeddings n_positions dim_model",
    ),
    (4, "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads"),
    (4, "attention_heads num_experts num_local_experts n_routed_experts"),
    (96, "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (16, "head_dim"),
    (8, "rotary_dim"),
    (1, "n_group topk_group n_shared_experts"),
    (0, "num_kv_shared_layers"),
    (32, "moe_intermediate_size shared_expert_intermediate_size"),
    (8, "sliding_window mamba_chunk_size chunk_size"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id num_experts_per_tok"),
    (0.0, "dropout attention_dropout activation_dropout hidden_dropout attention_probs_dropout_prob"),
    (0.0, "hidden_dropout_prob embd_pdrop resid_pdrop attn_pdrop"),
    (True, "qk_layernorm use_qk_norm"),
    (False, "use_cache tie_word_embeddings"),
)
_CHANGES: dict[str, dict[str, object]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "mpt": {"attn_pdrop": 0},
    "xmod": {"default_language": "en_XX"},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
}
# Multi-head latent attention, where the head size is that of the rotary part.
_LATENT = {
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
}
_LAYERS = ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"]
# What some kinds do not take beside the sizes above: left out step by step until a model runs.
_OPTIONAL = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "sliding_window", "qk_layernorm", "use_qk_norm", "num_key_value_heads"),
)


class NotTinyError(Exception):
    """The sizes of this file make no small working model of this kind; the message says why."""


def tiny_model(kind: str, num_key_value_heads: int = 4, **changes: object) -> nn.Module:
    """A model of width 64 with 4 heads and one layer at least of each type that its default configuration has, in
    fp32 and eval mode; its weights, norms and biases too, are noise.

    The weights are the same in every process; torch's generator is left as it was. NotTinyError where no such model can
    be built that runs on `token_ids`. ``changes`` are attributes of the configuration.
    """
    reasons = []
    for left_out in _OPTIONAL:
        sizes = {"num_key_value_heads": num_key_value_heads, **_CHANGES.get(kind, {}), **changes}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _model(_config(CONFIG_MAPPING[kind], sizes, left_out))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise NotTinyError("; ".join(dict.fromkeys(reasons)))


def token_ids(length: int = 12) -> Tensor:
    """Two sequences without special tokens [2, length]."""
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(3))


def _model(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise NotTinyError(f"it still has {size / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        model(input_ids=token_ids())
    return model


def _config(
    config_class: type[PreTrainedConfig], sizes: dict[str, object], left_out: tuple[str, ...]
) -> PreTrainedConfig:
    default = config_class()
    known = {name: value for value, names in _SIZES for name in names.split()}
    if _has(default, "qk_rope_head_dim"):
        known |= _LATENT
    known |= dict.fromkeys(_LAYERS, _layers_with_each_type(default))
    arguments = {name: value for name, value in (known | sizes).items() if _has(default, name)}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            arguments[name] = _config(type(part), sizes, left_out)
    return config_class(**{name: value for name, value in arguments.items() if name not in left_out})


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a configuration with one value for each layer raises instead of answering
        return True


def _layers_with_each_type(default: PreTrainedConfig) -> int:
    """2, or as many as show each type of layer that the default configuration has."""
    types = list(getattr(default, "layer_types", None) or [])
    longest = max((types.index(kind) + 1 for kind in set(types)), default=2)
    return min(max(longest, 2), MAX_LAYERS)
