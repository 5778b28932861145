"""Attention without storing the scores (Dao et al., arXiv 2205.14135 and 2307.08691)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pypar.ops import attention_cuda, attention_native, attention_reference, attention_triton, native
from pypar.ops.attention_arguments import AttentionProblem, attention_problem, check_results
from pypar.ops.backend import Backend, choose
from pypar.ops.register import define, register_gradient
from pypar.ops.rows import accumulate_dtype, native_refusal

Window = tuple[int | None, int | None]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | int | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | int | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
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
        alibi_slopes: [N] or [B, N]; slope * |distance| is subtracted (arXiv 2108.12409).
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

    A query that sees no key gives 0, lse -inf and zero gradients.

    Returns out, like q with Hv for H, contiguous; with return_lse also lse [B, N, T] ([N, T] with cu_seqlens_q)
    in fp32 (fp64 for fp64), the natural logarithm of the softmax's denominator. Both are differentiable, once.
    ValueError: shapes, dtypes or devices that do not fit, numbers out of range, a backend that refuses.
    """
    problem = attention_problem(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        bias=bias,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    chosen = choose("attention", BACKENDS, {"problem": problem}, backend)
    out, lse = _forward(*_flat(problem), chosen.name)
    return (out, lse) if return_lse else out


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
    return choose("attention", BACKENDS, {"problem": problem}, backend).forward(problem, carry)


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


# ---- backends


def _native_unsupported(problem: AttentionProblem) -> str | None:
    return native_refusal(problem.q, problem.k, problem.v)


def _native_forward(problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    return attention_native.forward(native.module(), problem, carry)


def _native_backward(problem: AttentionProblem, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_native.backward(native.module(), problem, *arguments)


def _reference_unsupported(problem: AttentionProblem) -> str | None:
    return None


BACKENDS = (
    Backend("cuda", attention_cuda.forward, attention_cuda.backward, attention_cuda.unsupported),
    Backend("triton", attention_triton.forward, attention_triton.backward, attention_triton.unsupported),
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("reference", attention_reference.forward, attention_reference.backward, _reference_unsupported),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


# ---- registration

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, float scale, int left, int right, float softcap, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? bias, float dropout_p, Tensor? seed, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, str backend"
)


_FIELDS = tuple(argument.split()[1] for argument in _PROBLEM.split(", ")[:-1])
_TENSORS = tuple(a.split()[1] for a in _PROBLEM.split(", ") if a.startswith("Tensor"))


def _flat(problem: AttentionProblem) -> tuple:
    return tuple(getattr(problem, name) for name in _FIELDS)


def _run_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    return _BY_NAME[backend].forward(AttentionProblem(*fields), None)


def _run_backward(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, bias_needs: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, backend = arguments
    problem = AttentionProblem(*fields)
    q, sinks, bias = problem.q, problem.sinks, problem.bias
    dscores = q.new_zeros(problem.scores_shape, dtype=lse.dtype) if bias_needs else None
    run = _BY_NAME[backend].backward
    assert run is not None
    dq, dk, dv = run(problem, dout, out, lse, dlse, None, dscores)
    dsinks = (
        q.new_empty(0)
        if sinks is None
        else attention_reference.sinks_gradient(sinks, dout, out, lse, dlse).to(sinks.dtype)
    )
    if dscores is None or bias is None:
        return dq, dk, dv, dsinks, q.new_empty(0)
    return dq, dk, dv, dsinks, dscores.sum_to_size(bias.shape).to(bias.dtype)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = AttentionProblem(*arguments[:-1])
    q = problem.q
    return q.new_empty(problem.out_shape), q.new_empty(problem.lse_shape, dtype=accumulate_dtype(q))


def _fake_backward(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, bias_needs: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    p = AttentionProblem(*arguments[:-1])
    dsinks = p.q.new_empty(0) if p.sinks is None else p.sinks.new_empty(p.sinks.shape)
    dbias = p.bias.new_empty(p.bias.shape) if bias_needs and p.bias is not None else p.q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (p.q, p.k, p.v)), dsinks, dbias)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *fields, ctx.backend = inputs
    p = AttentionProblem(*fields)
    ctx.options = replace(p, **dict.fromkeys(_TENSORS))  # type: ignore[arg-type] # autograd keeps the tensors
    ctx.save_for_backward(*(getattr(p, name) for name in _TENSORS), *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    problem = replace(ctx.options, **dict(zip(_TENSORS, tensors, strict=True)))
    if dout is None:
        dout = torch.zeros_like(out)
    bias_needs = problem.bias is not None and ctx.needs_input_grad[_FIELDS.index("bias")]
    gradients = _backward(dout, out, lse, dlse, bias_needs, *_flat(problem), ctx.backend)
    dq, dk, dv, dsinks, dbias = gradients
    named = {
        "q": dq,
        "k": dk,
        "v": dv,
        "sinks": None if problem.sinks is None else dsinks,
        "bias": dbias if bias_needs else None,
    }
    return (*(named.get(name) for name in _FIELDS), None)


_forward = define("attention_forward", f"({_PROBLEM}) -> (Tensor, Tensor)", _run_forward, _fake_forward)
_backward = define(
    "attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, Tensor? dlse, bool bias_needs, {_PROBLEM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
register_gradient("attention", _gradient, _save)
