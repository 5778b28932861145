"""How many bytes of activations a decoder's layers keep between forward and backward: the formula, exact."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pypar.models.decoder import DecoderConfig

_STATISTIC_BYTES = 4  # of a norm and of attention: fp32


@dataclass(frozen=True)
class Microbatch:
    """What one rank's layers are given at a time.

    sequences, positions   B, and T of this rank: the sequence length over cp
    dtype_bytes            of an element of the activations
    head_ranks             ranks that share the heads and the feed-forward part
    sequence_parallel      whether the activations between layers are cut over them
    is_tiled               whether the feed-forward part runs in tiles
    lse_copies             2 where attention keeps what rounding took off its log-sum-exp (fp32 on a CPU), else 1
    """

    sequences: int
    positions: int
    dtype_bytes: int
    head_ranks: int = 1
    sequence_parallel: bool = False
    is_tiled: bool = False
    lse_copies: int = 1


def layer_bytes(
    config: DecoderConfig, given: Microbatch, *, recomputed: bool = False, kept: Collection[str] = ()
) -> int:
    """What autograd keeps of one layer: its input and what is kept inside it, without the tables of `rope`.

    recomputed: by `pypar.recompute`, which keeps the results of the operators ``kept`` ("full": of none). Not
    recomputed, per token and in elements of D, N heads of H, G heads of H, and F: the two norms keep their inputs
    (2 D), the products theirs (2 D, N H, F), attention q, k, v (N H, 2 G H; its result is the product's input),
    the gate its two (2 F); and statistics in fp32.
    """
    rows = given.sequences * given.positions
    cut_rows = rows // given.head_ranks if given.sequence_parallel else rows
    N, G, F = (n // given.head_ranks for n in (config.num_heads, config.num_kv_heads, config.d_ff))
    if given.is_tiled:
        F = 0  # it is there while a tile is computed
    heads, kv_heads = N * config.head_size, G * config.head_size
    stream = cut_rows * config.d_model * given.dtype_bytes  # x, a norm's result, a product's
    statistics = cut_rows * _STATISTIC_BYTES
    attention = rows * (heads * given.dtype_bytes + N * given.lse_copies * _STATISTIC_BYTES)
    per_row = rows * given.dtype_bytes
    if not recomputed:
        return 4 * stream + 2 * statistics + attention + per_row * (heads + 2 * kv_heads + 3 * F)
    results = {
        "attention": attention,
        # The last product is not: nobody needs its result.
        "linear": stream + per_row * (heads + 2 * kv_heads + 2 * F),
        "rms_norm": 3 * stream + 2 * statistics,
        "rope": per_row * (heads + kv_heads),
        "gated": per_row * F,
    }
    return stream + sum(results[name] for name in results if name in kept)
