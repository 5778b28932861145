"""Attention without storing the scores (Dao et al., arXiv 2205.14135 and 2307.08691)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from pypar.ops.attention.arguments import (
    AttentionProblem,
    ScoreKeywords,
    ScoreOptions,
    Window,
    check_results,
    problem_of,
)
from pypar.ops.attention.operator import BY_NAME, flat, run_forward
from pypar.ops.backend import choose
from pypar.ops.register import overridable
from pypar.ops.rows import accumulate_dtype
from pypar.ops.uncompiled import uncompiled

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKENDS = tuple(BY_NAME.values())
_RAW = "it is attention's kernels alone, for use within an operator or an autograd.Function; pypar.attention compiles"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
    **options: Unpack[ScoreKeywords],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str | None = ...,
    **options: Unpack[ScoreKeywords],
) -> tuple[Tensor, Tensor]: ...
@overridable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) v, summed in fp32, each result and each gradient rounded once.

    The score of query t and key s is scale * q . k, capped, plus bias, minus the ALiBi penalty; -inf unseen.

    Args:
        q, k, v: [B, T, N, H], [B, S, G, H], [B, S, G, Hv], one dtype, any strides. N / G query heads share a
            key/value head: query head n uses head n // (N / G).
        causal: a query sees the keys up to its own position. The last query is at the last key's position:
            query t is at position t + S - T.
        scale: 1 / sqrt(H) when None.
        window: (left, right), a query sees the keys at most that many positions before and after its own;
            None leaves a side open. Keys outside cost no time.
        softcap: c > 0 turns a score x into c * tanh(x / c) (Gemma 2, arXiv 2408.00118).
        sinks: [N], a score that takes part in the softmax without a value (arXiv 2309.17453); differentiable.
        alibi_slopes: [N] or [B, N]; slope * |distance| is subtracted (arXiv 2108.12409); no gradient.
        bias: added to the scores, broadcasts to [B, N, T, S], of q's dtype or float32; -inf hides a key;
            differentiable (its gradient takes B * N * T * S floats of memory).
        dropout_p: probabilities are dropped with this probability, the others divided by 1 - dropout_p. Which
            ones depends only on dropout_seed and on (batch, head, query position, key position).
        dropout_seed: a number or an int64 tensor [1]; drawn from torch's generator when None.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where the sequences begin and end in q [T, N, H], k [S, G, H],
            v [S, G, Hv], which hold them one after the other. A sequence may be empty. Values on a GPU are
            not checked, as that would stop the host.
        deterministic: False permits sums in the order of arrival; no backend makes use of it yet.
        backend: one of the names that `pypar doctor` lists.

    A query that sees no key gives 0, lse -inf and zero gradients. Autocast does not apply: q, k and v have one dtype.

    A key that a query does not see changes no bit of that query's out, lse and dq, and the query changes no bit of that
    key's dk and dv, whatever the two hold: NaN and inf reach only what sees them. With the backends "cuda" and "triton"
    this holds for keys of other sequences of cu_seqlens; there NaN or inf in a key, value, query or dout may also reach
    what a causal mask, a window or a bias hides it from.

    With backend "native" the bits of a query's out, lse and dq depend on the query and on its sequence's keys up to
    the last that it sees, not on the other queries of the call; but calls of few rows (T * N / G at most 16, with
    cu_seqlens on average), as in decoding, are summed in another order, and fp16 products scale dq by all rows.

    Returns out, like q with Hv for H, contiguous; with return_lse also lse [B, N, T] ([N, T] with cu_seqlens_q)
    in fp32 (fp64 for fp64), the natural logarithm of the softmax's denominator. Both are differentiable, once.
    ValueError: shapes, dtypes or devices that do not fit, numbers out of range, a backend that refuses.
    """
    options = ScoreOptions(causal, scale, window, softcap, sinks, alibi_slopes, bias, dropout_p, dropout_seed)
    problem = problem_of(q, k, v, options, cu_seqlens_q, cu_seqlens_k)
    chosen = choose("attention", BACKENDS, {"problem": problem}, backend)
    out, lse, _ = run_forward(*flat(problem), chosen.name)
    return (out, lse) if return_lse else out


@uncompiled(_RAW)
@torch.no_grad()
def attention_forward(
    problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) without autograd, for those who write their own backward.

    carry: fp32 out and lse of attention over earlier keys. This problem's keys are added to them, as if all
    keys had been there at once: they are updated in place and returned. Sinks belong to one of the parts.
    """
    if carry is not None:
        check_results(problem, {"carry[0]": carry[0]}, {"carry[1]": carry[1]}, (accumulate_dtype(problem.q),))
    results = choose("attention", BACKENDS, {"problem": problem}, backend).forward(problem, carry)
    return results.out, results.lse


@uncompiled(_RAW)
@torch.no_grad()
def attention_backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) for dout, like out, and dlse, like lse (None: zero).

    out and lse may be the final ones of an attention over more keys than the problem's: then the results are
    the gradients of these keys and this part's share of dq (dlse is then the final lse's).
    into: fp32 tensors like q, k and v to which the gradients are added instead.
    """
    dtypes = (problem.q.dtype,)
    check_results(problem, {"dout": dout, "out": out}, {"lse": lse, "dlse": dlse}, dtypes)
    for name, x, total in zip(
        ("dq", "dk", "dv"), (problem.q, problem.k, problem.v), into or (), strict=False
    ):
        if total.shape != x.shape or total.dtype != accumulate_dtype(x) or total.device != x.device:
            raise ValueError(
                f"{name} {tuple(total.shape)} {total.dtype} on {total.device} must be {tuple(x.shape)} "
                f"{accumulate_dtype(x)} on {x.device} to be added to"
            )
    chosen = choose("attention", BACKENDS, {"problem": problem}, backend)
    assert chosen.backward is not None
    return chosen.backward(problem, dout, out, lse, dlse, into, None)
