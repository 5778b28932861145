"""Attention's definition in plain PyTorch, in fp64: what every backend is compared with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pypar.ops.attention.arguments import AttentionProblem, AttentionResults, Positions
from pypar.ops.attention.checks import UNBOUNDED
from pypar.ops.rows import accumulate_dtype

_ROUNDS, _MULTIPLIER, _KEY_STEP, _LOW = 10, 0xD256D193, 0x9E3779B9, 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox 2x32-10 (Salmon et al., Random123, SC 2011): two random 32-bit numbers of a counter and a key.

    The arguments are int64 that hold 32-bit numbers.
    """
    for _ in range(_ROUNDS):
        low, high = _multiply(c0)
        c0, c1 = high ^ key ^ c1, low
        key = (key + _KEY_STEP) & _LOW
    return c0, c1


def _multiply(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper half of x * _MULTIPLIER, by halves of x, so that nothing exceeds 63 bits."""
    lower = (x & 0xFFFF) * _MULTIPLIER
    upper = (x >> 16) * _MULTIPLIER + (lower >> 16)
    return ((upper & 0xFFFF) << 16) | (lower & 0xFFFF), upper >> 16


def dropout_keep(
    seed: int, dropout_p: float, batch: Tensor, head: Tensor, q_position: Tensor, k_position: Tensor
) -> Tensor:
    """True where the element (batch, head, query position, key position) of the probabilities is kept.

    The four are int64 tensors that broadcast against each other. An element's fate depends on nothing else. A
    negative seed counts as the uint64 of the same bits.
    """
    low, high = torch.tensor(seed & _LOW), torch.tensor(seed >> 32 & _LOW)
    batch, head, q_position, k_position = (x & _LOW for x in (batch, head, q_position, k_position))
    stream, _ = philox(*philox(batch, head, low.to(batch.device)), high.to(batch.device))
    random, _ = philox(k_position, q_position, stream)
    return random >= math.floor(dropout_p * 2**32)


Carry = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def forward(problem: AttentionProblem, carry: Carry | None) -> AttentionResults:
    """(out, lse). A carry, fp32 (out, lse) over earlier keys, is continued: updated in place and returned."""
    q = problem.q
    if carry is None:
        out, lse = q.new_empty(problem.out_shape), q.new_empty(problem.lse_shape, dtype=accumulate_dtype(q))
    else:
        out, lse = carry
    for part, rows, _ in sequences(problem):
        before = None if carry is None else (_batch(problem, out, rows), _batch(problem, lse.mT, rows).mT)
        part_out, part_lse = _forward(part, before)
        _batch(problem, out, rows).copy_(part_out)
        _batch(problem, lse.mT, rows).mT.copy_(part_lse)
    return AttentionResults(out, lse)


def backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: Gradients | None,
    dbias: Tensor | None,
    lse_rest: None = None,
) -> Gradients:
    """(dq, dk, dv), in the inputs' dtypes; or, given fp32 tensors to add `into`, these.

    dbias: [B, N, T, S] in fp32, zero, receives the gradient of the scores. out and lse may be the final ones of an
    attention over more keys than these. lse_rest: this backend makes none.
    """
    results = into or tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in _qkv(problem))
    for part, rows, keys in sequences(problem):
        gradients = _backward(
            part,
            _batch(problem, dout, rows),
            _batch(problem, out, rows),
            _batch(problem, lse.mT, rows).mT,
            None if dlse is None else _batch(problem, dlse.mT, rows).mT,
            dbias,
        )
        for result, gradient, span in zip(results, gradients, (rows, keys, keys), strict=True):
            target = _batch(problem, result, span)
            target.copy_(target + gradient if into else gradient)
    return results  # type: ignore[return-value]


def sinks_gradient(sinks: Tensor, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """[N]: a sink is a key whose value is 0, so its score's gradient is p * (0 - delta). For every backend."""
    delta = (dout * out.to(lse.dtype)).sum(-1).mT
    if dlse is not None:
        delta = delta - dlse
    share = (sinks.unsqueeze(-1) - lse).exp() * delta
    return -(share.sum(-1) if share.dim() == 2 else share.sum((0, 2)))


def sequences(problem: AttentionProblem) -> list[tuple[AttentionProblem, slice, slice]]:
    """(problem with a batch dimension and positions, its rows, its keys): one, or one for each sequence."""
    T, S = problem.q.shape[-3], problem.k.shape[-3]
    if problem.cu_seqlens_q is None or problem.cu_seqlens_k is None:
        placed = replace(problem, positions=problem.positions or Positions(q_start=S - T))
        return [(placed, slice(0, T), slice(0, S))]
    ends = [x.tolist() for x in (problem.cu_seqlens_q, problem.cu_seqlens_k)]
    return [_sequence(problem, i, *(slice(e[i], e[i + 1]) for e in ends)) for i in range(len(ends[0]) - 1)]


def _sequence(
    problem: AttentionProblem, index: int, rows: slice, keys: slice
) -> tuple[AttentionProblem, slice, slice]:
    last_aligned = Positions(q_start=(keys.stop - keys.start) - (rows.stop - rows.start))
    positions = problem.positions or last_aligned
    slopes = problem.alibi_slopes
    part = replace(
        problem,
        q=problem.q[None, rows],
        k=problem.k[None, keys],
        v=problem.v[None, keys],
        alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[index : index + 1],
        positions=replace(positions, batch_start=positions.batch_start + index),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
    )
    return part, rows, keys


def _qkv(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.q, problem.k, problem.v


def _batch(problem: AttentionProblem, x: Tensor, span: slice) -> Tensor:
    """The part of x that belongs to a sequence, with a batch dimension. x itself without sequences."""
    if not problem.varlen:
        return x
    return x[span].unsqueeze(0)


def _scores(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [B, N, T, S], -inf where a query does not see a key; derivative of the cap; seen [B, N, T, S]). fp64."""
    q, k = problem.q.double(), problem.k.double()
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(group, 2)) * problem.scale
    slope = torch.ones((), dtype=scores.dtype, device=q.device)
    if problem.softcap:
        capped = torch.tanh(scores / problem.softcap)
        scores, slope = capped * problem.softcap, 1 - capped**2
    if problem.bias is not None:
        scores = scores + problem.bias.double()
    q_position, k_position = _positions(problem)
    distance = q_position[:, None] - k_position
    if problem.alibi_slopes is not None:
        scores = scores - problem.alibi_slopes.double()[..., None, None] * distance.abs()
    seen = torch.ones_like(distance, dtype=torch.bool)
    if problem.left != UNBOUNDED:
        seen &= distance <= problem.left
    if problem.right != UNBOUNDED:
        seen &= -distance <= problem.right
    if problem.bias is not None:
        seen = seen & (problem.bias != -math.inf)
    return scores.masked_fill(~seen, -math.inf), slope, seen.expand(scores.shape)


def _positions(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    at = problem.positions
    assert at is not None
    t = torch.arange(problem.q.shape[1], device=problem.q.device)
    s = torch.arange(problem.k.shape[1], device=problem.q.device)
    return at.q_start + at.step * t, at.k_start + at.step * s


def _kept(problem: AttentionProblem) -> Tensor | float:
    """What dropout multiplies the probabilities by: [B, N, T, S] of 0 and 1 / (1 - dropout_p)."""
    if problem.seed is None:
        return 1.0
    at = problem.positions
    assert at is not None
    B, N, *_ = problem.scores_shape
    batch = torch.arange(B, device=problem.q.device) + at.batch_start
    head = torch.arange(N, device=problem.q.device) + at.head_start
    q_position, k_position = _positions(problem)
    keep = dropout_keep(
        int(problem.seed),
        problem.dropout_p,
        batch[:, None, None, None],
        head[:, None, None],
        q_position[:, None],
        k_position,
    )
    return keep.double() / (1 - problem.dropout_p)


def _sum_seen(weights: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    """[B, R, N, H]: the sum of weights [B, N, R, C] times values [B, C, N, H] over C, where `seen` [B, N, R, C].

    Elsewhere the weights are 0, and 0 times a value that is not finite would be NaN.
    """
    finite = values.isfinite()
    if finite.all():
        return torch.einsum("bnrc,bcnh->brnh", weights, values)
    total = torch.einsum("bnrc,bcnh->brnh", weights, values.masked_fill(~finite, 0.0))
    rest = values.masked_fill(finite, 0.0)
    for c in (~finite).any(-1).any(-1).any(0).nonzero().flatten().tolist():
        product = weights[..., c].mT.unsqueeze(-1) * rest[:, c : c + 1]
        total += product.where(seen[..., c].mT.unsqueeze(-1), 0.0)
    return total


def _forward(problem: AttentionProblem, before: Carry | None) -> tuple[Tensor, Tensor]:
    scores, _, seen = _scores(problem)
    v = problem.v.double().repeat_interleave(problem.q.shape[2] // problem.v.shape[2], 2)
    terms = [scores]
    if problem.sinks is not None:
        terms.append(problem.sinks.double()[:, None, None].expand(*scores.shape[:3], 1))
    if before is not None:
        terms.append(before[1].double().unsqueeze(-1))
    terms.append(scores.new_full((*scores.shape[:3], 1), -math.inf))  # logsumexp of nothing has no value
    lse = torch.cat(terms, -1).logsumexp(-1)
    p = (scores - _finite(lse).unsqueeze(-1)).exp().masked_fill(~seen, 0.0) * _kept(problem)
    out = _sum_seen(p, seen, v)
    if before is not None:
        share = before[0].double() * (before[1].double() - _finite(lse)).exp().mT.unsqueeze(-1)
        out = out + share.masked_fill((before[1] == -math.inf).mT.unsqueeze(-1), 0.0)
    return out, lse


def _backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dbias: Tensor | None,
) -> Gradients:
    """With p = exp(score - lse): dv = p^T dout, dscore = p * (dout v^T - sum(dout * out) + dlse)."""
    dout, q, k, v = dout.double(), problem.q.double(), problem.k.double(), problem.v.double()
    group = q.shape[2] // k.shape[2]
    k_heads, v_heads = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    delta = (dout * out.double()).sum(-1).mT
    if dlse is not None:
        delta = delta - dlse
    scores, slope, seen = _scores(problem)
    kept = _kept(problem)
    p = (scores - _finite(lse.double()).unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    dp = torch.einsum("btnh,bsnh->bnts", dout, v_heads) * kept
    dscores = (p * (dp - delta.unsqueeze(-1))).masked_fill(~seen, 0.0)
    if dbias is not None:
        dbias.copy_(dscores)
    dscores = (dscores * slope * problem.scale).masked_fill(~seen, 0.0)
    dq = _sum_seen(dscores, seen, k_heads)
    dk = _sum_seen(dscores.mT, seen.mT, q)
    dv = _sum_seen((p * kept).mT, seen.mT, dout)
    return dq, dk.unflatten(2, (-1, group)).sum(3), dv.unflatten(2, (-1, group)).sum(3)


def _finite(lse: Tensor) -> Tensor:
    """lse, with 0 for rows that see no key: exp(-inf - 0) is 0 where exp(-inf + inf) would be NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)
