"""Ring attention: each rank holds a part of the sequence, keys and values travel round the ring while
attention runs.

Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889. Every hop starts the next exchange,
computes its attention and only then waits. Partial results are combined in fp32 and rounded once at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pypar.comm import Handle, RingExchange
from pypar.context_parallel.hops import Hop, hops
from pypar.context_parallel.layouts import positions_of
from pypar.mesh import Axis, as_axis
from pypar.ops.attention import attention, attention_backward, attention_forward
from pypar.ops.attention_arguments import AttentionProblem, attention_problem


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Axis | dist.ProcessGroup,
    *,
    layout: str = "zigzag",
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over a sequence whose positions are spread over `group` as `layout` says; exact.

    Args:
        q, k, v: this rank's part, [B, T, N, H], [B, T, G, H] and [B, T, G, Hv] with N a multiple of G; the
            same shapes on every rank. Rotary positions come from `positions`.
        layout: "contiguous" or "zigzag"; the one with which the sequence was sharded.
        causal: each position sees itself and earlier ones of the whole sequence; else all see all.
        scale: of the scores, 1/sqrt(H) by default. backend: of the attention op, as in `pypar.attention`.

    Returns this rank's part of the output, [B, T, N, Hv] in q's dtype. On one rank it is `pypar.attention`.
    Each rank sends what `hops.forward_bytes` and `hops.backward_bytes` say. ValueError: shapes or layout
    that do not fit.
    """
    axis = as_axis(group)
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not q.shape[1] == k.shape[1] == v.shape[1]:
        raise ValueError(
            f"ring attention needs q [B, T, N, H], k [B, T, G, H] and v [B, T, G, Hv] with one T, but got"
            f" {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; shard all three with the same layout"
        )
    positions_of(q.shape[1] * axis.size, axis.rank, axis.size, layout)  # refuses a layout that does not fit
    if axis.size == 1:
        return attention(q, k, v, causal=causal, scale=scale, backend=backend)
    plan = hops(q.shape[1], axis.rank, axis.size, layout, causal=causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _RingAttention.apply(q, k, v, axis, plan, scale, backend)  # type: ignore[no-untyped-call]


class _RingAttention(torch.autograd.Function):
    """Both passes walk the same hops in the same order."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        axis: Axis,
        plan: list[Hop | None],
        scale: float,
        backend: str | None,
    ) -> Tensor:
        ring = RingExchange(axis)
        k_here, v_here = k, v
        travelling = _pack(k, v)
        # The running result stays in fp32: rounded at every hop, its error would grow with the number of ranks.
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=_wide(q), device=q.device)
        lse = torch.empty((*q.shape[:-3], q.shape[2], q.shape[1]), dtype=_wide(q), device=q.device)
        out.zero_()
        lse.fill_(-math.inf)
        for index, hop in enumerate(plan):
            arriving = ring.start(travelling) if index + 1 < axis.size else None
            if hop is not None:
                problem = _problem(hop, q, k_here, v_here, scale)
                rows = hop.queries
                attention_forward(problem, (out[:, rows], lse[:, :, rows]), backend)
            if arriving is not None:
                travelling = arriving.wait()
                k_here, v_here = _unpack(travelling, k, v)
        rounded = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, rounded, lse)
        ctx.axis, ctx.plan, ctx.scale, ctx.backend = axis, plan, scale, backend
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring = RingExchange(ctx.axis)
        dout = dout.contiguous()
        dq = torch.zeros(q.shape, dtype=_wide(q), device=q.device)
        k_here, v_here = k, v
        travelling = _pack(k, v)
        gradients_arriving: Handle | None = None
        for index, hop in enumerate(ctx.plan):
            arriving = ring.start(travelling) if index + 1 < ctx.axis.size else None
            shares: list[Tensor] = []
            if hop is not None:
                rows, keys = hop.queries, hop.keys
                dk, dv = (torch.zeros(x[:, keys].shape, dtype=dq.dtype, device=q.device) for x in (k, v))
                shares = [dk, dv]
                attention_backward(
                    _problem(hop, q, k_here, v_here, ctx.scale),
                    dout[:, rows],
                    out[:, rows],
                    lse[:, :, rows],
                    into=(dq[:, rows], dk, dv),
                    backend=ctx.backend,
                )
            if gradients_arriving is None:  # hop 0, this rank's own keys, all of them
                sums = _pack(*shares)
            else:  # what the ranks before added for these keys, which travelled during this hop
                sums = gradients_arriving.wait()
                if hop is not None:
                    for total, share in zip(_unpack(sums, k, v), shares, strict=True):
                        total[:, hop.keys] += share
            gradients_arriving = ring.start(sums)
            if arriving is not None:
                travelling = arriving.wait()
                k_here, v_here = _unpack(travelling, k, v)
        assert gradients_arriving is not None
        dk, dv = _unpack(gradients_arriving.wait(), k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _problem(hop: Hop, q: Tensor, k: Tensor, v: Tensor, scale: float) -> AttentionProblem:
    rows, keys = hop.queries, hop.keys
    return attention_problem(q[:, rows], k[:, keys], v[:, keys], causal=hop.causal, scale=scale)


def _wide(q: Tensor) -> torch.dtype:
    """The dtype of running sums: fp32, fp64 for fp64 input."""
    return torch.promote_types(q.dtype, torch.float32)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """k and v one after the other in one flat buffer, so that one message carries both."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the two halves of a packed buffer in the shapes of k and v."""
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)
