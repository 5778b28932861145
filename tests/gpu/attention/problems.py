"""Operands of attention with any options, for backends too slow for tests/ops/attention/matrix.py; and what
judge.py there does not ask of a backend: gradients added to tensors, results continued over blocks of keys."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pypar.ops.attention.arguments import Positions, attention_problem
from pypar.ops.backend import Backend
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import expect


def draw(  # noqa: PLR0913
    T: int = 70,
    S: int = 90,
    N: int = 2,
    G: int | None = None,
    H: int = 32,
    Hv: int | None = None,
    B: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    bias: tuple[int, ...] | None = None,
    sinks: bool = False,
    alibi: tuple[int, ...] | None = None,
    lengths: tuple[list[int], list[int]] | None = None,
    transposed: bool = False,
    **keywords: Any,
) -> tuple[dict[str, Tensor], dict]:
    """(tensors, other keywords) of attention. bias: its shape, a tenth of it -inf. alibi: the slopes' shape.
    lengths: of
    each sequence's queries and keys, instead of B, T and S. transposed: [B, N, T, H] in memory."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    G = G or N
    if lengths is not None:
        keywords["cu_seqlens_q"], keywords["cu_seqlens_k"] = (
            torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in lengths
        )
        B, T, S = 1, sum(lengths[0]), sum(lengths[1])
    tensors = {"q": normal(B, T, N, H), "k": normal(B, S, G, H), "v": normal(B, S, G, Hv or H)}
    if transposed:
        tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    if lengths is not None:
        tensors = {name: x[0] for name, x in tensors.items()}
    if bias is not None:
        hidden = torch.rand(bias, generator=generator) < 0.1
        tensors["bias"] = normal(*bias).masked_fill(hidden, -math.inf)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    if sinks:
        tensors["sinks"] = normal(N).requires_grad_()
    if alibi is not None:
        tensors["alibi_slopes"] = normal(*alibi).abs() / 8
    if keywords.get("dropout_p"):
        keywords.setdefault("dropout_seed", 0x123456789ABCDEF)
    return tensors, keywords


@torch.no_grad()
def check_added(backend: Backend, tensors: dict[str, Tensor], keywords: dict) -> None:
    """Gradients added to fp32 tensors are those that are returned otherwise, before these are rounded."""
    problem = attention_problem(**tensors, **keywords)
    out, lse, *_ = backend.forward(problem, None)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    fresh = backend.backward(problem, dout, out, lse, None, None, None)
    into = tuple(torch.full(x.shape, 0.5) for x in fresh)
    added = backend.backward(problem, dout, out, lse, None, into, None)
    for once, total, given in zip(fresh, added, into, strict=True):
        assert total is given
        difference = total - 0.5
        rounding = (
            2.0**-24 * (1 + once.abs().float().max()) + torch.finfo(once.dtype).eps / 2 * once.abs().float()
        )
        assert ((difference - once.float()).abs() <= 2 * rounding).all()


def check_carry(backend: Backend, tensors: dict[str, Tensor], keywords: dict, parts: list[int]) -> None:
    """Out, lse and gradients through a running result over blocks of keys of these lengths, the first with
    the sinks."""
    problem = attention_problem(**{name: x.detach() for name, x in tensors.items()}, **keywords)
    q, (B, N, T, S) = problem.q, problem.scores_shape
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(x, generator=generator) for x in (problem.out_shape, problem.lse_shape)]
    douts[0] = douts[0].to(q.dtype)
    expected = expect(lambda **x: plain_attention(**x, **keywords), tensors, douts)
    carry = (torch.full(problem.out_shape, math.nan), torch.full(problem.lse_shape, -math.inf))
    pieces = []
    for start, length in zip([sum(parts[:i]) for i in range(len(parts))], parts, strict=True):
        span = slice(start, start + length)
        bias = None if problem.bias is None else problem.bias.expand(B, N, T, S)[..., span]
        piece = replace(
            problem, k=problem.k[:, span], v=problem.v[:, span], bias=bias, positions=Positions(S - T, start)
        )
        pieces.append((span, piece if start == 0 else replace(piece, sinks=None)))
        assert backend.forward(pieces[-1][1], carry)[0] is carry[0]
    for name, actual in zip(("out", "lse"), carry, strict=True):
        expected.check(name, actual.to(expected.plains[0][name].dtype))
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, problem.k, problem.v))
    out = carry[0].to(q.dtype)
    for span, piece in pieces:
        backend.backward(piece, douts[0], out, carry[1], douts[1], (dq, dk[:, span], dv[:, span]), None)
    for name, actual in zip("qkv", (dq, dk, dv), strict=True):
        expected.check(f"d{name}", actual.to(q.dtype))
