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


@dataclass(frozen=True)
class Held:
    """The most bytes of all layers at once, on the device and on the host."""

    device: int
    host: int


def peak_bytes(
    config: DecoderConfig,
    given: Microbatch,
    *,
    recomputed: bool = False,
    kept: Collection[str] = (),
    offloaded: bool = False,
) -> Held:
    """What the layers hold at most in the course of a step of one microbatch, by `layer_bytes`.

    It is when the backward of the last layer begins: what the layers before it keep, and all that this one needs, with
    the products that a forward alone needs where products' results are kept: queries and keys before `rope`, and what
    attention adds to the stream. Offloaded, what a layer keeps is on the host but for the last one's, and comes back
    for one layer ahead.
    """
    each = layer_bytes(config, given, recomputed=recomputed, kept=kept)
    needed = layer_bytes(config, given)
    if recomputed and "linear" in kept:
        rows = given.sequences * given.positions
        cut_rows = rows // given.head_ranks if given.sequence_parallel else rows
        heads = (config.num_heads + config.num_kv_heads) // given.head_ranks * config.head_size
        needed += (cut_rows * config.d_model + rows * heads) * given.dtype_bytes
    before = config.num_layers - 1
    here = min(before, 1) if offloaded else before
    return Held(here * each + needed, before * each if offloaded else 0)
