"""Ring attention: keys and values travel round the ring while attention runs.

Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889. The table of `route` says what is sent when,
`sub_blocks` into what a block is divided for it: the transfers of a hop are in flight while the hop computes, and are
waited for where what they bring is needed. Keys and values are one buffer, of key/value heads only; sums of dk and dv
travel in fp32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pypar.comm import shares_memory
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.layouts import num_positions
from pypar.context_parallel.methods.blockwise import (
    add_backward,
    add_forward,
    empty_sums,
    finish,
    sinks_share,
)
from pypar.context_parallel.methods.ring.buffers import Block, RingBuffers
from pypar.context_parallel.methods.ring.route import rank_route
from pypar.context_parallel.methods.ring.sub_blocks import SubBlock, rounds_of
from pypar.ops.calls import called
from pypar.ops.rows import accumulate_dtype
from pypar.ops.uncompiled import uncompiled


def ring(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`."""
    refuse_options("ring", call.method_options)
    return _Ring.apply(q, k, v, call.sinks, call.bias, call)  # type: ignore[no-untyped-call]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:

        def compute() -> tuple[Tensor, ...]:
            sums = empty_sums(q, v)
            kept = [
                x for buffers in _rounds("forward", q, k, v, call) for x in _forward(buffers, q, sums, call)
            ]
            return *finish(sums, sinks, q.dtype), *kept

        out, lse, *kept = called("attention", (q, k, v, sinks, bias), compute)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse, *kept)
        ctx.set_materialize_grads(False)
        ctx.call = replace(call, sinks=None, bias=None)  # autograd keeps the tensors
        return out, lse

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse, *kept = ctx.saved_tensors
        call = replace(ctx.call, bias=bias)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq = torch.zeros(q.shape, dtype=accumulate_dtype(q), device=q.device)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dbias = torch.zeros_like(bias, dtype=dq.dtype) if ctx.needs_input_grad[4] else None
        results, into = (dout, out, lse, dlse), (dq, dk, dv)
        for buffers in _rounds("backward", q, k, v, call):
            buffers.keep([kept.pop(0) for _ in buffers.sub_blocks if kept])
            _backward(buffers, q, results, into, dbias, call)
        dsinks = sinks_share(sinks, dout, out, lse, dlse) if ctx.needs_input_grad[3] else None
        return (
            dq.to(q.dtype),
            dk,
            dv,
            dsinks,
            None if dbias is None else dbias.to(bias.dtype),
            None,
        )


def _rounds(direction: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Iterator[RingBuffers]:
    """The buffers of each round, one after the other."""
    axis = call.axis
    route = rank_route(call.queries, call.keys, call.mask, axis.rank)
    longest = max(num_positions(held) for held in call.keys)
    for round_ in rounds_of(q.shape[-2], k.shape[-2], axis.size, longest, shares_memory(axis)):
        yield RingBuffers(direction, route, round_, k, v, call)


def _forward(buffers: RingBuffers, q: Tensor, sums: Block, call: Call) -> list[Tensor]:
    """Continue (out, lse) of all queries. Returns what backward begins with."""
    for hop in buffers.hops():
        for sub_block in [buffers.whole] if hop == 0 else buffers.sub_blocks:
            buffers.start(buffers.outgoing(sub_block))
            if buffers.sees:
                rows = sub_block.heads.rows
                operands, into = (q[rows], *buffers.block(sub_block)), (sums[0][rows], sums[1][rows])
                add_forward(buffers.pieces(sub_block), *operands, into, sub_block.heads.call(call))
            buffers.release(sub_block)
    return buffers.kept()


def _backward(
    buffers: RingBuffers,
    q: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    into: tuple[Tensor, Tensor, Tensor],
    dbias: Tensor | None,
    call: Call,
) -> None:
    """results: dout, out, lse, dlse. Adds to dq, writes dk and dv of the round's keys, adds to dbias."""
    dq, *own = into
    summed: deque[tuple[SubBlock, Block]] = deque()  # the own block's
    for hop in buffers.hops():
        for sub_block in buffers.sub_blocks:
            buffers.start(buffers.incoming(sub_block))
            if buffers.sees:
                rows, share = sub_block.heads.rows, buffers.empty_share(sub_block)
                dout, out, lse = (x[rows] for x in results[:3])
                dlse = None if results[3] is None else results[3][rows]
                add_backward(
                    buffers.pieces(sub_block),
                    (q[rows], *buffers.block(sub_block)),
                    (dout, out, lse, dlse),
                    (dq[rows], *share),
                    sub_block.heads.bias(dbias),
                    sub_block.heads.call(call),
                )
                if hop > 0:
                    buffers.add_arrived(sub_block, share)
                else:
                    summed.append((sub_block, share))
            buffers.release(sub_block)
            # Sub-blocks of the own block are done when the other ranks' sums are there, which may be late without harm.
            while summed and (sub_block is buffers.sub_blocks[-1] or buffers.has_arrived(summed[0][0])):
                buffers.add_arrived(*summed[0])
                for x, y in zip(own, summed[0][1], strict=True):
                    buffers.cut(x, summed[0][0]).copy_(y)
                summed.popleft()
