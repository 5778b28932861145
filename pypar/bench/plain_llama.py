"""The decoder of pypar.models in plain PyTorch, as one writes it today: what bench/train.py compares with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pypar.models import DecoderConfig


class PlainAttention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        width, kv_width = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q = nn.Linear(config.d_model, width, bias=False)
        self.k = nn.Linear(config.d_model, kv_width, bias=False)
        self.v = nn.Linear(config.d_model, kv_width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for y in (self.q(x_BTD), self.k(x_BTD), self.v(x_BTD))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class PlainLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = PlainAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = PlainFeedForward(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos, sin)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class PlainLlama(nn.Module):
    """tokens, targets [B, T] -> the mean loss over the targets."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        size = self.config.head_size
        inverse = self.config.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = torch.arange(tokens_BT.shape[1], dtype=torch.float32)[:, None] * inverse
        cos, sin = angle.cos(), angle.sin()
        hidden_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, cos, sin)
        logits_BTV = self.head(self.norm(hidden_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the head, as Llama does, in the precision of cos and sin."""
    first, second = x_BNTH.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BNTH.dtype)
