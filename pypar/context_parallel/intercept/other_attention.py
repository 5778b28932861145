"""Attention that `shard_context` notices but cannot run over a group: refused, as it would see a rank's part alone."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch

from pypar.ops.uncompiled import uncompiled

# Operators by their names in torch.ops. FlashAttention has some since 2.7.1; before, and in its version 4, it has none.
_ATEN = (
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
_OTHERS = (
    ("torch_attn", "_varlen_attn"),
    ("torch_attn", "_varlen_attn_out"),
    ("flash_attn", "_flash_attn_forward"),
    ("flash_attn", "_flash_attn_varlen_forward"),
    ("flash_attn_3", "fwd"),
    ("flash_attn_3", "_flash_attn_forward"),
    ("xformers", "efficient_attention_forward_cutlass"),
    ("xformers_flash", "flash_fwd"),
    ("xformers_flash3", "flash_fwd"),
)


def _refusal(name: str) -> str:
    return (
        f"{name} under shard_context would attend to the keys of this rank alone; call "
        "torch.nn.functional.scaled_dot_product_attention, pypar.attention or pypar.ring_attention"
    )


def refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    """In place of the function of that name, whatever it is called with."""
    raise ValueError(_refusal(name))


def refused_functions() -> dict[Any, str]:
    """What a TorchFunctionMode may be asked for, with its name: of the packages that are imported by now."""
    found: dict[Any, str] = {}
    for space, name in (*(("aten", name) for name in _ATEN), *_OTHERS):
        packet = getattr(getattr(torch.ops, space), name, None)
        if packet is not None:
            found |= dict.fromkeys((packet, *(getattr(packet, x) for x in packet.overloads())), name)
        if space == "aten" and hasattr(torch, name):
            found[getattr(torch, name)] = name
    return found


def is_flex_attention(function: Any) -> bool:
    module = sys.modules.get("torch._higher_order_ops.flex_attention")
    return module is not None and function is module.flex_attention


@uncompiled(_refusal("flex_attention"))  # which compiles itself, as one graph
def refuse_flex_attention() -> NoReturn:
    refuse("flex_attention")
