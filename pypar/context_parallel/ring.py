"""Ring attention: each rank holds a part of the sequence, keys and values travel round the ring while
attention runs.

Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889. Every hop starts the next exchange,
computes its attention and only then waits. Partial results are combined in fp32 and rounded once at the end.
"""

from __future__ import annotations

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
from pypar.ops.merge import merge


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
        # attention_forward rounds its output to its inputs' dtype, so they are widened: parts rounded
        # at every hop make the error grow with the number of ranks. The CPU kernel computes in fp32 and takes
        # the same time for both.
        q_wide = q.to(_wide(q))
        for index, hop in enumerate(plan):
            arriving = ring.start(travelling) if index + 1 < axis.size else None
            if hop is not None:
                part_out, part_lse = attention_forward(
                    q_wide[:, hop.queries],
                    k_here[:, hop.keys].to(q_wide.dtype),
                    v_here[:, hop.keys].to(q_wide.dtype),
                    hop.causal,
                    scale,
                    backend,
                )
                if index == 0:
                    out, lse = part_out, part_lse
                else:
                    _merge_into(out, lse, part_out, part_lse, hop.queries)
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
                dq_share, *shares = attention_backward(
                    dout[:, rows],
                    q[:, rows],
                    k_here[:, keys],
                    v_here[:, keys],
                    out[:, rows],
                    lse[:, :, rows].contiguous(),
                    None,
                    hop.causal,
                    ctx.scale,
                    ctx.backend,
                    fp32_gradients=True,
                )
                dq[:, rows] += dq_share
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


def _wide(q: Tensor) -> torch.dtype:
    """The dtype of running sums: fp32, fp64 for fp64 input."""
    return torch.promote_types(q.dtype, torch.float32)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """k and v one after the other in one flat buffer, so that one message carries both."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the two halves of a packed buffer in the shapes of k and v."""
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)


def _merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: slice) -> None:
    """Merges attention over more keys into rows of the running out [B, T, N, Hv] and lse [B, N, T]."""
    merged_out, merged_lse = merge(out[:, rows], lse[:, :, rows], part_out, part_lse)
    out[:, rows] = merged_out
    lse[:, :, rows] = merged_lse
