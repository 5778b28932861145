"""Ring attention: keys and values travel round the ring while attention runs.

Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889. What is sent when is the table of `route`:
the transfers of a hop are in flight while the hop computes, and are waited for after it. Keys and values are one
buffer, of key/value heads only; sums of dk and dv travel in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pypar.comm import Handle, exchange_start
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.layouts import num_positions
from pypar.context_parallel.partial import add_backward, add_forward, empty_sums, finish, sinks_share
from pypar.context_parallel.route import KEYS, Transfer, rank_route
from pypar.ops.rows import accumulate_dtype

_TAG = 1 << 26  # apart from the tags of sends that the caller makes on the same group


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
        rank, size = call.axis.rank, call.axis.size
        route = rank_route(call.queries, call.keys, call.mask, rank)
        walk = _Walk("forward", route.forward, k, v, call)
        sums = empty_sums(q, v)
        kept = None
        for hop in range(size):
            source = (rank - hop) % size
            block = walk.keys.get(source)
            with walk.in_flight(hop):
                if hop in route.hops:
                    add_forward(call.pieces(rank, source), q, *walk.unpack(block, source), sums, call)
            if hop == route.hops[-1] and hop > 0:
                kept = block  # where backward begins
        out, lse = finish(sums, sinks, q.dtype)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse, kept)
        ctx.set_materialize_grads(False)
        ctx.call = replace(call, sinks=None, bias=None)  # autograd keeps the tensors
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse, kept = ctx.saved_tensors
        call = replace(ctx.call, bias=bias)
        rank, size = call.axis.rank, call.axis.size
        route = rank_route(call.queries, call.keys, call.mask, rank)
        walk = _Walk("backward", route.backward, k, v, call)
        if kept is not None:
            walk.keys[(rank - route.hops[-1]) % size] = kept
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        wide = accumulate_dtype(q)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dbias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[4] else None
        for hop in reversed(range(size)):
            source = (rank - hop) % size
            block = walk.keys.get(source)
            with walk.in_flight(hop):
                if hop in route.hops:
                    k_here, v_here = walk.unpack(block, source)
                    share = torch.zeros(k_here.numel() + v_here.numel(), dtype=wide, device=k.device)
                    into = (dq, *walk.unpack(share, source))
                    pieces = call.pieces(rank, source)
                    add_backward(pieces, (q, k_here, v_here), (dout, out, lse, dlse), into, dbias, call)
            if hop in route.hops:  # what the ranks before added came while this one computed
                arrived = walk.sums.pop(source, None)
                walk.sums[source] = share if arrived is None else share.add_(arrived)
        dk, dv = walk.unpack(walk.sums[rank], rank)
        dsinks = sinks_share(sinks, dout, out, lse, dlse) if ctx.needs_input_grad[3] else None
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv.to(v.dtype),
            dsinks,
            None if dbias is None else dbias.to(bias.dtype),
            None,
        )


class _Walk:
    """The buffers that a rank holds on its way through the hops, by the rank they come from.

    keys: blocks of k and v; the rank's own is there where it is to be sent. sums: gradients of blocks.
    """

    def __init__(
        self, direction: str, rounds: tuple[tuple[Transfer, ...], ...], k: Tensor, v: Tensor, call: Call
    ) -> None:
        self._direction, self._rounds, self._call, self._own = direction, rounds, call, (k, v)
        self.keys: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        rank = call.axis.rank
        outgoing = [t for transfers in rounds for t in transfers if t.kind == KEYS and t.sender == rank]
        self._sent_on = {t.source for t in outgoing}
        if rank in self._sent_on:
            # One buffer, so that one message carries both.
            self.keys[rank] = torch.cat([k.detach().reshape(-1), v.detach().reshape(-1)])

    def unpack(self, block: Tensor | None, source: int) -> tuple[Tensor, Tensor]:
        """Views [.., S, G, H] and [.., S, G, Hv] of the block of a rank; None is this rank's own k and v."""
        k, v = self._own
        if block is None:
            assert source == self._call.axis.rank, "what is not this rank's own was sent to it"
            return k, v
        shapes = [self._shape(x, source) for x in (k, v)]
        split = block.numel() * shapes[0][-1] // (shapes[0][-1] + shapes[1][-1])
        return block[:split].view(shapes[0]), block[split:].view(shapes[1])

    @contextlib.contextmanager
    def in_flight(self, hop: int) -> Iterator[None]:
        """The transfers of the hop start before and have arrived after what is done inside."""
        transfers = self._rounds[hop]
        with self._named(hop):
            sent, received = self._start(transfers)
        yield
        with self._named(hop):
            for transfer, handle in received:
                held = self.keys if transfer.kind == KEYS else self.sums
                held[transfer.source] = handle.wait()
            for handle in sent:
                handle.wait()
        source = (self._call.axis.rank - hop) % self._call.axis.size
        if source not in self._sent_on:
            self.keys.pop(source, None)

    def _start(self, transfers: tuple[Transfer, ...]) -> tuple[list[Handle], list[tuple[Transfer, Handle]]]:
        rank = self._call.axis.rank
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[Transfer] = []
        for transfer in transfers:
            held = self.keys if transfer.kind == KEYS else self.sums
            if transfer.sender == rank:
                sends.append((held.pop(transfer.source), transfer.receiver))
            else:
                receives.append((self._buffer(transfer), transfer.sender))
                arriving.append(transfer)
        sent, received = exchange_start(sends, receives, self._call.axis, _TAG)
        return sent, list(zip(arriving, received, strict=True))

    def _buffer(self, transfer: Transfer) -> Tensor:
        k, v = self._own
        size = sum(torch.Size(self._shape(x, transfer.source)).numel() for x in (k, v))
        return torch.empty(
            size, dtype=k.dtype if transfer.kind == KEYS else accumulate_dtype(k), device=k.device
        )

    def _shape(self, x: Tensor, source: int) -> tuple[int, ...]:
        """Of x, k or v, on another rank."""
        return (*x.shape[:-3], num_positions(self._call.keys[source]), *x.shape[-2:])

    @contextlib.contextmanager
    def _named(self, hop: int) -> Iterator[None]:
        """An error of the communication tells where the ring was."""
        try:
            yield
        except RuntimeError as error:
            size = self._call.axis.size
            raise RuntimeError(
                f"ring attention, {self._direction}, hop {hop} of {size - 1} on rank {self._call.axis.rank} of "
                f"axis {self._call.axis.name!r}: {error}"
            ) from error
