"""A Llama-style decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU) for one device.

`pypar.parallelize` spreads it over a mesh: `Decoder.parallel_plan` says which module has which role.

Shapes: B batch, T query positions, S key positions, N query heads, G key/value heads, H head size, D model width,
F feed-forward width, V vocabulary. Sources: Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864), GQA (arXiv
2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pypar.blocks import Block
from pypar.models.cache import KeyValueCache
from pypar.models.initial_weights import initial_weight
from pypar.models.layers import CausalAttention, Head, Linear, Positions, RMSNorm
from pypar.ops import rope, swiglu
from pypar.sequences import Sequences

INITIAL_STD = (
    0.02  # GPT-2's; the two projections that write into the residual stream are scaled by 1/sqrt(2 layers)
)
RESIDUAL = ("attention.out.weight", "feed_forward.down.weight")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; every number is the whole model's, never one rank's."""

    filled_in: ClassVar[tuple[str, ...]] = ("vocab_size", "head_size")

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    d_ff: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide by num_kv_heads ({self.num_kv_heads}): each "
                "key/value head serves the same number of query heads"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head_size ({self.head_size}) must be even: RoPE rotates pairs; use {self.head_size + 1}"
            )

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters that take part in a matrix product for every token (the embedding lookup does not)."""
        attention_DN = self.d_model * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)
        return (
            self.num_layers * (attention_DN + 3 * self.d_model * self.d_ff) + self.vocab_size * self.d_model
        )

    @property
    def num_parameters(self) -> int:
        """All parameters, each once."""
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        norms = (2 * self.num_layers + 1) * self.d_model
        return self.num_matmul_parameters + embedding + norms

    @property
    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights outside of the layers, from which a reader knows a model before it is made."""
        return {"embedding.weight": (self.vocab_size, self.d_model)}

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs a token: 6 x matmul parameters + 6 L N H T (causal half of attention)."""
        return 6 * self.num_matmul_parameters + 6 * self.num_layers * self.num_heads * self.head_size * length


class Attention(nn.Module):
    """Causal self-attention: x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_size = config.head_size
        width, kv_width = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q = Linear(config.d_model, width, dtype)
        self.k = Linear(config.d_model, kv_width, dtype)
        self.v = Linear(config.d_model, kv_width, dtype)
        self.out = Linear(width, config.d_model, dtype)
        self.core = CausalAttention()

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        sequences: Sequences | None = None,
    ) -> Tensor:
        q_BTNH, k_BTGH, v_BTGH = (
            project(x_BTD).unflatten(-1, (-1, self.head_size)) for project in (self.q, self.k, self.v)
        )
        q_BTNH, k_BTGH = rope(q_BTNH, cos, sin, k_BTGH)
        if cache is not None:
            k_BTGH, v_BTGH = cache.append(self, k_BTGH, v_BTGH)
        out_BTNH = self.core(q_BTNH, k_BTGH, v_BTGH, sequences)
        return self.out(out_BTNH.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, dtype)
        self.up = Linear(config.d_model, config.d_ff, dtype)
        self.down = Linear(config.d_ff, config.d_model, dtype)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x_BTD), self.up(x_BTD)))


class Layer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.feed_forward = FeedForward(config, dtype)

    def forward(self, x_BTD: Tensor, *given: Any) -> Tensor:
        """given: what `Attention.forward` takes."""
        attended_BTD = self.attention(self.attention_norm(x_BTD), *given)
        normed_BTD, x_BTD = self.feed_forward_norm(attended_BTD, residual=x_BTD)
        return x_BTD + self.feed_forward(normed_BTD)


class Decoder(nn.Module):
    """The decoder: token ids [B, T] -> logits [B, T, V], or their loss.

    seed: of the initial weights, which depend on it and on each weight's name and shape only; None leaves them without
    values, as a model on the meta device has them (``with torch.device("meta"): Decoder(config, seed=None)``, then
    `pypar.parallel.materialize(model, model.initial_weight(seed))`).
    """

    parallel_plan = {
        "embedding": "vocab",
        "positions": "positions",
        "*.attention.q": "column",
        "*.attention.k": "column",
        "*.attention.v": "column",
        "*.attention.core": "attention",
        "*.attention.out": "row",
        "*.feed_forward.gate": "column",
        "*.feed_forward.up": "column",
        "*.feed_forward.down": "row",
        "*norm": "norm",
        "head": "head",
    }
    position_wise = ("*.feed_forward",)  # what `recompute.tiles` acts on

    def __init__(
        self, config: DecoderConfig, *, seed: int | None = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.positions = Positions()
        # Its own initial values would be drawn for nothing.
        no_values = torch.empty(config.vocab_size, config.d_model, dtype=dtype)
        self.embedding: nn.Embedding | None = nn.Embedding.from_pretrained(no_values, freeze=False)
        self.layers = nn.ModuleDict({str(i): Layer(config, dtype) for i in range(config.num_layers)})
        self.norm: RMSNorm | None = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.head: Head | None = Head(config.d_model, config.vocab_size, dtype)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        if seed is not None:
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_weight(seed)(name, tuple(parameter.shape)))

    def initial_weight(self, seed: int) -> Callable[[str, tuple[int, ...]], Tensor]:
        """The first value of a weight, whole, by its name and shape."""
        residual_std = INITIAL_STD / (2 * self.config.num_layers) ** 0.5

        def value(name: str, shape: tuple[int, ...]) -> Tensor:
            if len(shape) == 1:  # norms
                return torch.ones(shape)
            return initial_weight(name, shape, seed, residual_std if name.endswith(RESIDUAL) else INITIAL_STD)

        return value

    def blocks(self) -> list[Block]:
        """Embedding, layers, and the head with the norm before it; `forward` runs those that are there."""
        layers = [Block(f"layers.{i}", (f"layers.{i}",)) for i in self.layers]
        return [Block("embedding", ("embedding",)), *layers, Block("head", ("norm", "head"))]

    def rope_tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [T, H/2] in fp32 of the angles position x theta^(-2i/H)."""
        size = self.config.head_size
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions_T.device) / size
        angle = positions_T.float()[:, None] * self.config.rope_theta**-exponent
        return angle.cos(), angle.sin()

    def forward(
        self,
        x: Tensor,
        *,
        cache: KeyValueCache | None = None,
        sequences: Sequences | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """x: token ids [B, T], or the hidden state [B, T, D] where the embedding is another stage's. Returns the
        logits [B, T, V], or the hidden state where the head is another stage's.

        ``cache`` holds keys and values of earlier positions. ``sequences`` None: x has whole sequences, each of which
        is one document. ``targets``: int64 [B, T], of which the head gives the loss in place of the logits (`Head`).
        """
        cos, sin = self.rope_tables(self.positions(x, sequences, 0 if cache is None else cache.length))
        hidden_BTD = x if self.embedding is None else self.embedding(x)
        for layer in self.layers.values():
            hidden_BTD = layer(hidden_BTD, cos, sin, cache, sequences)
        if self.head is None or self.norm is None:
            return hidden_BTD
        return self.head(self.norm(hidden_BTD), targets)
