"""What attention is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from pypar.ops.attention.checks import (
    UNBOUNDED,
    check_dropout,
    check_inputs,
    check_scale,
    check_scores,
    check_softcap,
    check_tensor,
    check_window,
)
from pypar.ops.rows import accumulate_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

Window = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """What becomes of scores between q . k and the softmax's product with v, as a caller gives it: `pypar.attention`
    describes each."""

    causal: bool = False
    scale: float | None = None
    window: Window | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | int | None = None


class ScoreKeywords(TypedDict, total=False):
    """The fields of `ScoreOptions`, for type checkers."""

    causal: bool
    scale: float | None
    window: Window | None
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | int | None


@dataclass(frozen=True)
class Positions:
    """Where these queries and keys stand in the whole computation, which a rank may hold a part of.

    Query t is at position q_start + step * t, key s at k_start + step * s: what causal masks, windows, ALiBi and
    dropout look at. Batch element b and head n are the (batch_start + b)th and the (head_start + n)th of the
    whole: what dropout looks at.
    """

    q_start: int = 0
    k_start: int = 0
    step: int = 1
    batch_start: int = 0
    head_start: int = 0


@dataclass(frozen=True)
class AttentionProblem:
    """The operands and options of one attention, checked; `attention_problem` makes it.

    q [B, T, N, H], k [B, S, G, H], v [B, S, G, Hv], or [T, N, H] ... with cu_seqlens_q and cu_seqlens_k.
    left, right: a query sees the keys at most `left` before and `right` after its own position, UNBOUNDED: all.
    positions None: the last query is at the last key's position (of each sequence).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    positions: Positions | None = None

    @classmethod
    def example(cls, x: Tensor) -> AttentionProblem:
        """Attention of x [B, T, N, H] to itself: what `pypar doctor` asks the backends about."""
        return attention_problem(x, x, x)

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[B, N, T], varlen [N, T]."""
        *batch, T, N, _ = self.q.shape
        return (*batch, N, T)

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """[B, N, T, S], which a bias must broadcast to."""
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1])


class AttentionResults(NamedTuple):
    """What a backend's forward gives: lse + lse_rest is the lse before it was rounded, where the backend knows it."""

    out: Tensor
    lse: Tensor
    lse_rest: Tensor | None = None


def attention_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Positions | None = None,
    **options: Unpack[ScoreKeywords],
) -> AttentionProblem:
    """`problem_of` with the options by their names."""
    return problem_of(q, k, v, ScoreOptions(**options), cu_seqlens_q, cu_seqlens_k, positions)


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: ScoreOptions,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Positions | None = None,
) -> AttentionProblem:
    """The arguments of `pypar.attention` and `positions`, checked and put into their final form."""
    check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k)
    left, right = check_window(options.window, options.causal)
    num_sequences = None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    sinks, slopes = options.sinks, options.alibi_slopes
    check_scores(q, k, sinks, slopes, options.bias, num_sequences)
    dropout_p = check_dropout(options.dropout_p)
    if positions is not None and positions.step < 1:
        raise ValueError(f"positions.step ({positions.step}) must be at least 1")
    return AttentionProblem(
        q,
        k,
        v,
        check_scale(options.scale, q),
        left,
        right,
        check_softcap(options.softcap),
        None if sinks is None else sinks.to(accumulate_dtype(q)).contiguous(),
        None if slopes is None else slopes.detach().to(accumulate_dtype(q)).contiguous(),
        options.bias,
        dropout_p,
        _seed(options.dropout_seed, q) if dropout_p > 0 else None,
        None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        positions,
    )


def check_results(problem: AttentionProblem, outs: dict, lses: dict, out_dtypes: tuple) -> None:
    device, lse_dtype = problem.q.device, accumulate_dtype(problem.q)
    for name, x in (outs | lses).items():
        if x is None:
            continue
        shape, dtypes = (problem.out_shape, out_dtypes) if name in outs else (problem.lse_shape, (lse_dtype,))
        if x.shape != shape or x.dtype not in dtypes or x.device != device:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must be {shape} {dtypes[0]} on {device}; "
                "pass what attention_forward returned, or its gradient"
            )


def _seed(seed: Tensor | int | None, q: Tensor) -> Tensor:
    """[1] int64 on q's device: drawn from torch's generator of that device when None."""
    if seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
    if isinstance(seed, int):
        if not 0 <= seed < 2**63:
            raise ValueError(f"dropout_seed ({seed}) must be at least 0 and below 2^63")
        return torch.full((1,), seed, dtype=torch.int64, device=q.device)
    check_tensor("dropout_seed", seed)
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != q.device:
        raise ValueError(
            f"dropout_seed {tuple(seed.shape)} {seed.dtype} on {seed.device} must be one int64, shape (1,), "
            f"on {q.device}"
        )
    return seed
