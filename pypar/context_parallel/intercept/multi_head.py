"""torch's nn.MultiheadAttention with another attention inside: its own function does not let that be replaced."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def multi_head(  # noqa: PLR0913 - torch's signature
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """F.multi_head_attention_forward, [T, B, D] or [T, D], over an attention of torch's signature."""
    refused = {
        "need_weights": need_weights,
        "key_padding_mask": key_padding_mask is not None,
        "add_bias_kv": bias_k is not None or bias_v is not None,
        "add_zero_attn": add_zero_attn,
        "static_k": static_k is not None or static_v is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"nn.MultiheadAttention under shard_context cannot have {name}; call it without")
    weights: tuple[Tensor | None, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight and in_proj_weight is not None:
        weights = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1))  # type: ignore[arg-type]
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    dim = q.dim()  # 4 with a batch
    q, k, v = (x.movedim(0, -2) for x in (q, k, v))  # [B, N, T, H]
    if is_causal:  # torch takes it for a description of the mask
        attn_mask = None
    elif attn_mask is not None and attn_mask.dim() == 3 and dim == 4:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    out = attend(q, k, v, attn_mask, dropout_p if training else 0.0, is_causal)
    return F.linear(out.movedim(-2, 0).flatten(-2), out_proj_weight, out_proj_bias), None
