"""Configurations of transformers' decoders whose attention differs."""

from typing import Any

from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, PretrainedConfig


def decoders(sizes: dict[str, Any], window: int, head_dim: int) -> dict[str, PretrainedConfig]:
    """By name: plain attention, a window, a softcap and a window, sinks and a window."""
    windows = sizes | {"sliding_window": window}
    return {
        "llama": LlamaConfig(**sizes),
        "mistral with a window": MistralConfig(**windows),
        "gemma2 with softcap and window": Gemma2Config(
            **windows, head_dim=head_dim, attn_logit_softcapping=2.0, query_pre_attn_scalar=head_dim
        ),
        "gpt-oss with sinks and window": GptOssConfig(
            **windows, head_dim=head_dim, num_local_experts=2, num_experts_per_tok=1
        ),
    }
