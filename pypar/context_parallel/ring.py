"""Ring attention: keys and values travel round the ring while attention runs.

Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889. What is sent when is the table of `route`,
in the parts of `parts`: the transfers of a hop are in flight while the hop computes, and are waited for where what
they bring is needed. Keys and values are one buffer, of key/value heads only; sums of dk and dv travel in fp32.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pypar.comm import shares_memory
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.layouts import num_positions
from pypar.context_parallel.partial import add_backward, add_forward, empty_sums, finish, sinks_share
from pypar.context_parallel.parts import Part, parts_of
from pypar.context_parallel.route import rank_route
from pypar.context_parallel.walk import Block, Walk
from pypar.ops.rows import accumulate_dtype


def ring(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`."""
    refuse_options("ring", call.method_options)
    return _Ring.apply(q, k, v, call.sinks, call.bias, call)  # type: ignore[no-untyped-call]


METHODS = {"ring": ring}


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        walk = _walk("forward", q, k, v, call)
        sums = empty_sums(q, v)
        for hop, source in walk.hops():
            if hop == 0:
                walk.start(walk.outgoing())
                add_forward(call.pieces(source, source), q, k, v, sums, call)
                continue
            for part in walk.parts:
                walk.start(walk.outgoing(part))
                if hop in walk.route.hops:
                    rows = part.heads.rows
                    block, into = walk.block(source, part), (sums[0][rows], sums[1][rows])
                    add_forward(walk.pieces(source, part), q[rows], *block, into, part.heads.call(call))
                walk.release(part)
        out, lse = finish(sums, sinks, q.dtype)
        # Of the last hop: where backward begins.
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse, *walk.kept())
        ctx.set_materialize_grads(False)
        ctx.call = replace(call, sinks=None, bias=None)  # autograd keeps the tensors
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse, *kept = ctx.saved_tensors
        call = replace(ctx.call, bias=bias)
        walk = _walk("backward", q, k, v, call)
        walk.keep(kept)
        del kept  # or its memory stays until the end
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq = torch.zeros(q.shape, dtype=accumulate_dtype(q), device=q.device)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dbias = torch.zeros_like(bias, dtype=dq.dtype) if ctx.needs_input_grad[4] else None
        own: deque[tuple[Part, Block]] = deque()
        for hop, source in walk.hops():
            for part in walk.parts:
                walk.start(walk.incoming(part))
                if hop in walk.route.hops:
                    rows, share = part.heads.rows, walk.empty_share(source, part)
                    add_backward(
                        walk.pieces(source, part),
                        (q[rows], *walk.block(source, part)),
                        (dout[rows], out[rows], lse[rows], None if dlse is None else dlse[rows]),
                        (dq[rows], *share),
                        part.heads.bias(dbias),
                        part.heads.call(call),
                    )
                    if hop > 0:
                        walk.add_arrived(source, part, share)
                    else:
                        own.append((part, share))
                walk.release(part)
                _settle(walk, source, own, (dk, dv), wait=False)
        _settle(walk, source, own, (dk, dv), wait=True)
        dsinks = sinks_share(sinks, dout, out, lse, dlse) if ctx.needs_input_grad[3] else None
        return (
            dq.to(q.dtype),
            dk,
            dv,
            dsinks,
            None if dbias is None else dbias.to(bias.dtype),
            None,
        )


def _settle(walk: Walk, rank: int, own: deque[tuple[Part, Block]], into: Block, wait: bool) -> None:
    """Parts of the own block's gradients are done when the other ranks' sums are there, which may take its time."""
    while own and (wait or walk.has_arrived(rank, own[0][0])):
        part, share = own.popleft()
        walk.add_arrived(rank, part, share)
        for x, y in zip(into, share, strict=True):
            walk.cut(x, rank, part).copy_(y)


def _walk(direction: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Walk:
    axis = call.axis
    longest = max(num_positions(held) for held in call.keys)
    parts = parts_of(q.shape[-2], k.shape[-2], axis.size, longest, shares_memory(axis))
    return Walk(direction, rank_route(call.queries, call.keys, call.mask, axis.rank), parts, k, v, call)
