"""What attention is asked to compute, and what it accepts: every refusal is a ValueError that names the argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype

UNBOUNDED = -1  # a side of a window without a bound


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


def attention_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Positions | None = None,
) -> AttentionProblem:
    """The arguments of `pypar.attention` and `positions`, checked and put into their final form."""
    check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k)
    left, right = check_window(window, causal)
    num_sequences = None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    check_scores(q, k, sinks, alibi_slopes, bias, num_sequences)
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap ({softcap}) must be finite and not negative; 0 switches it off")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p ({dropout_p}) must be at least 0 and below 1")
    if positions is not None and positions.step < 1:
        raise ValueError(f"positions.step ({positions.step}) must be at least 1")
    return AttentionProblem(
        q,
        k,
        v,
        check_scale(scale, q),
        left,
        right,
        float(softcap),
        None if sinks is None else sinks.to(accumulate_dtype(q)).contiguous(),
        None if alibi_slopes is None else alibi_slopes.detach().to(accumulate_dtype(q)).contiguous(),
        bias,
        float(dropout_p),
        _seed(dropout_seed, q) if dropout_p > 0 else None,
        None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        positions,
    )


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> None:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(
            f"{missing} is missing: sequences of several lengths need cu_seqlens_q and cu_seqlens_k; for "
            "self-attention pass the same tensor twice"
        )
    dims, shape = (4, "[batch, positions, heads, head size]")
    if cu_seqlens_q is not None:
        dims, shape = (3, "[positions of all sequences, heads, head size] with cu_seqlens_q")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{name} {tuple(x.shape)} must be {shape}; reshape it")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; convert them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q is on {q.device}; move them to one device")
    N, H = q.shape[-2:]
    G = k.shape[-2]
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != H or H == 0:
        batch = f"q's batch ({q.shape[0]}) and " if dims == 4 else ""
        raise ValueError(
            f"k {tuple(k.shape)} must have {batch}q's head size ({H}), which must not be 0; "
            f"q is {tuple(q.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1] or v.shape[-1] == 0:
        raise ValueError(
            f"v {tuple(v.shape)} must have one vector per key of k {tuple(k.shape)}; "
            f"pass v of shape {(*k.shape[:-1], 'Hv')} with Hv > 0"
        )
    if G == 0 or N == 0 or N % G != 0:
        raise ValueError(
            f"q's number of heads ({N}) must be a positive multiple of k's ({G}): whole groups of query "
            "heads share a key/value head; pass k and v with a number of heads that divides it"
        )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q describes {cu_seqlens_q.shape[0] - 1} sequences and cu_seqlens_k "
                f"{cu_seqlens_k.shape[0] - 1}; they must describe the same ones"
            )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, of: str, x: Tensor) -> None:
    """Shape and dtype; on the CPU also the values, which on a GPU would make the host wait."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name} {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} must be int32 of shape [sequences + 1]"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"{name} is on {cu_seqlens.device} and {of} is on {x.device}; move them to one device"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or _has_no_values(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0]:
        raise ValueError(
            f"{name} goes from {ends[0]} to {ends[-1]}; it must start at 0 and end at {of}'s number of positions "
            f"({x.shape[0]})"
        )
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ValueError(
                f"{name}[{i}] ({ends[i]}) is below {name}[{i - 1}] ({ends[i - 1]}); it must not decrease"
            )


def _has_no_values(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor) or x.device.type == "meta"


def check_window(window: tuple[int | None, int | None] | None, causal: bool) -> tuple[int, int]:
    """(left, right) with causal folded in; UNBOUNDED for None and -1."""
    left, right = UNBOUNDED, UNBOUNDED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window ({window}) must be a pair (left, right); None in it leaves a side open")
        for name, side in zip(("left", "right"), window, strict=True):
            if side is not None and (not isinstance(side, int) or side < UNBOUNDED):
                raise ValueError(
                    f"window's {name} ({side}) must be a whole number of keys, at least 0; "
                    "None (or -1) leaves the side open"
                )
        left = UNBOUNDED if window[0] is None else window[0]
        right = UNBOUNDED if window[1] is None else window[1]
    return left, 0 if causal else right


def check_scores(
    q: Tensor,
    k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    num_sequences: int | None,
) -> None:
    N = q.shape[-2]
    for name, x in (("sinks", sinks), ("alibi_slopes", alibi_slopes), ("bias", bias)):
        if x is not None and (x.device != q.device or not x.is_floating_point()):
            raise ValueError(f"{name} {x.dtype} on {x.device} must be floating point on {q.device}")
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"sinks {tuple(sinks.shape)} must have one number per query head: ({N},)")
    if alibi_slopes is not None and alibi_slopes.shape != (N,):
        batch = q.shape[0] if num_sequences is None else num_sequences
        if alibi_slopes.shape != (batch, N):
            raise ValueError(f"alibi_slopes {tuple(alibi_slopes.shape)} must be ({N},) or ({batch}, {N})")
    if bias is None:
        return
    if num_sequences is not None:
        raise ValueError("bias does not combine with cu_seqlens_q; pad the sequences to one length for it")
    scores = (q.shape[0], N, q.shape[1], k.shape[1])
    fits = bias.dim() <= 4 and all(
        b in (1, s) for b, s in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(f"bias {tuple(bias.shape)} must broadcast to [B, N, T, S] = {scores}")
    if bias.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"bias is {bias.dtype}; it must be q's {q.dtype} or torch.float32: convert it")


def check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(
            f"scale ({scale}) must be finite; None gives 1 / sqrt(H), here {q.shape[-1] ** -0.5:.4g}"
        )
    return float(scale)


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
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != q.device:
        raise ValueError(
            f"dropout_seed {tuple(seed.shape)} {seed.dtype} on {seed.device} must be one int64, shape (1,), "
            f"on {q.device}"
        )
    return seed
