"""A Llama-style decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU) spread over a mesh.

Shapes: B batch, T query positions on this rank, N query heads, G key/value heads, H head size, D model width,
F feed-forward width, V vocabulary. Sources: Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864), GQA (arXiv
2305.13245).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pypar.context_parallel import positions
from pypar.grid import DATA
from pypar.initial_weights import initial_weight
from pypar.layout import Layout, layout_of, local_part, local_tensor, set_layout
from pypar.mesh import Mesh
from pypar.models.cache import KeyValueCache
from pypar.models.sequences import ContextParallel, Sequences, causal_attention
from pypar.ops import rms_norm, rope, swiglu
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
)

INITIAL_STD = (
    0.02  # GPT-2's; the two projections that write into the residual stream are scaled by 1/sqrt(2 layers)
)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; every number is the whole model's, never one rank's."""

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

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs a token: 6 x matmul parameters + 6 L N H T (causal half of attention)."""
        return 6 * self.num_matmul_parameters + 6 * self.num_layers * self.num_heads * self.head_size * length


@dataclass(frozen=True)
class _Parts:
    """Makes the parts of a decoder, all for one mesh, one way of splitting and one dtype."""

    mesh: Mesh
    sequence_parallel: bool
    context: ContextParallel
    dtype: torch.dtype

    def column(self, in_features: int, out_features: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            in_features,
            out_features,
            self.mesh.tp,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def row(self, in_features: int, out_features: int) -> RowParallelLinear:
        return RowParallelLinear(
            in_features,
            out_features,
            self.mesh.tp,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def norm(self, config: DecoderConfig) -> "RMSNorm":
        positions = self.mesh.tp.names if self.sequence_parallel else ()
        return RMSNorm(config.d_model, config.norm_eps, self.dtype, (*DATA, *positions))


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467); its weight's gradient is a part to be summed over ``sum_over``."""

    def __init__(
        self, d_model: int, eps: float, dtype: torch.dtype, sum_over: tuple[str, ...] = DATA
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, dtype=dtype))
        set_layout(self.weight, Layout((d_model,), sum_over=sum_over))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention: heads split over tp, positions over cp."""

    def __init__(self, config: DecoderConfig, parts: _Parts) -> None:
        super().__init__()
        self.parts, self.head_size = parts, config.head_size
        for what, heads in (("num_heads", config.num_heads), ("num_kv_heads", config.num_kv_heads)):
            if heads % parts.mesh.tp.size:
                raise ValueError(f"{what} ({heads}) must divide by the tp size ({parts.mesh.tp.size})")
        width = config.num_heads * config.head_size
        kv_width = config.num_kv_heads * config.head_size
        self.q = parts.column(config.d_model, width)
        self.k = parts.column(config.d_model, kv_width)
        self.v = parts.column(config.d_model, kv_width)
        self.out = parts.row(width, config.d_model)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        sequences: Sequences | None = None,
    ) -> Tensor:
        mesh = self.parts.mesh
        weights = (self.q.weight, self.k.weight, self.v.weight)
        qkv = column_parallel(x_BTD, weights, mesh.tp, sequence_parallel=self.parts.sequence_parallel)
        q_BTNH, k_BTGH, v_BTGH = (y.unflatten(-1, (-1, self.head_size)) for y in qkv)
        q_BTNH, k_BTGH = rope(q_BTNH, cos, sin), rope(k_BTGH, cos, sin)
        if cache is not None:
            k_BTGH, v_BTGH = cache.append(self, k_BTGH, v_BTGH)
        out_BTNH = causal_attention(q_BTNH, k_BTGH, v_BTGH, mesh.cp, self.parts.context, sequences)
        return self.out(out_BTNH.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, parts: _Parts) -> None:
        super().__init__()
        self.parts = parts
        self.gate = parts.column(config.d_model, config.d_ff)
        self.up = parts.column(config.d_model, config.d_ff)
        self.down = parts.row(config.d_ff, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        weights = (self.gate.weight, self.up.weight)
        gate_BTF, up_BTF = column_parallel(
            x_BTD, weights, self.parts.mesh.tp, sequence_parallel=self.parts.sequence_parallel
        )
        return self.down(swiglu(gate_BTF, up_BTF))


class Layer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, parts: _Parts) -> None:
        super().__init__()
        self.attention_norm = parts.norm(config)
        self.attention = Attention(config, parts)
        self.feed_forward_norm = parts.norm(config)
        self.feed_forward = FeedForward(config, parts)

    def forward(self, x_BTD: Tensor, *given: Any) -> Tensor:
        """given: what `Attention.forward` takes."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), *given)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Layers of one pipeline stage, as equal as possible.

    The last stage also holds the head, the first the embedding: a remainder goes to the stages in between first.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"num_layers ({num_layers}) must be at least the pp size ({num_stages}); use pp <= {num_layers}"
        )
    base, extra = divmod(num_layers, num_stages)
    order = sorted(range(num_stages), key=lambda s: (s == num_stages - 1, s == 0, s))
    sizes = [base + (order.index(s) < extra) for s in range(num_stages)]
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


class Decoder(nn.Module):
    """This rank's part of the decoder: its pipeline stage's layers, its tp shard of each weight.

    Initial weights depend on ``seed`` and on each weight's global name and shape only: all layouts start alike.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        sequence_parallel: bool = False,
        context: ContextParallel = ContextParallel(),  # noqa: B008 - frozen
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sequence_parallel = sequence_parallel and mesh.tp.size > 1
        self.config, self.mesh, self.sequence_parallel = config, mesh, sequence_parallel
        self.context = context
        self.is_first, self.is_last = mesh.pp.rank == 0, mesh.pp.rank == mesh.pp.size - 1
        parts = _Parts(mesh, sequence_parallel, context, dtype)
        if self.is_first:
            self.embedding = VocabParallelEmbedding(
                config.vocab_size, config.d_model, mesh.tp, sequence_parallel=sequence_parallel, dtype=dtype
            )
        stage = stage_layers(config.num_layers, mesh.pp.size, mesh.pp.rank)
        self.layers = nn.ModuleDict({str(i): Layer(config, parts) for i in stage})
        if self.is_last:
            self.norm = parts.norm(config)
            self.head = parts.column(config.d_model, config.vocab_size)
            if config.tied_embeddings and self.is_first:
                self.head.weight = self.embedding.weight
        if config.tied_embeddings and self.is_first != self.is_last:
            (self.embedding if self.is_first else self.head).sum_also_over(*mesh.tied.names)
        self.reset_parameters(seed)

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, local parameter); a tied head goes by the embedding's name, wherever it lives."""
        for name, parameter in self.named_parameters():
            tied_head = self.config.tied_embeddings and name == "head.weight"
            yield ("embedding.weight" if tied_head else name), parameter

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        residual_std = INITIAL_STD / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.global_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            layout = layout_of(parameter)
            std = (
                residual_std
                if name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                else INITIAL_STD
            )
            whole = initial_weight(name, layout.global_shape, seed, std)
            local_tensor(parameter).copy_(local_part(whole, layout, self.mesh))

    def rope_tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [T, H/2] in fp32 of the angles position x theta^(-2i/H)."""
        size = self.config.head_size
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions_T.device) / size
        angle = positions_T.float()[:, None] * self.config.rope_theta**-exponent
        return angle.cos(), angle.sin()

    def forward(
        self, x: Tensor, *, cache: KeyValueCache | None = None, sequences: Sequences | None = None
    ) -> Tensor:
        """One stage.

        x: token ids [B, T] (this cp rank's part) on the first stage, else the hidden state [B, T, D] ([B, T/tp, D]
        with sequence parallel). Returns the hidden state, on the last stage the logits' shard [B, T, V/tp].
        ``cache`` holds keys and values of earlier positions (generation on one rank's whole sequence).
        ``sequences`` None: every cp rank has equally many positions, and a sequence is one document.
        """
        held = x.shape[1] * (self.mesh.tp.size if self.sequence_parallel and not self.is_first else 1)
        if sequences is None and self.mesh.cp.size > 1:
            sequences = Sequences(held * self.mesh.cp.size)
        if sequences is not None:
            positions_T = positions(sequences.length, self.mesh.cp, self.context.layout).to(x.device)
        else:
            start = 0 if cache is None else cache.length
            positions_T = torch.arange(start, start + held, device=x.device)
        cos, sin = self.rope_tables(positions_T)
        hidden_BTD = self.embedding(x) if self.is_first else x
        for layer in self.layers.values():
            hidden_BTD = layer(hidden_BTD, cos, sin, cache, sequences)
        if not self.is_last:
            return hidden_BTD
        (logits_BTV,) = column_parallel(
            self.norm(hidden_BTD), (self.head.weight,), self.mesh.tp, sequence_parallel=self.sequence_parallel
        )
        return logits_BTV
