"""Ring attention: keys and values travel round the ring while attention runs.

Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889. What is sent when is the table of `route`:
the transfers of a hop are in flight while the hop computes, and are waited for where what they bring is needed.
Keys and values are one buffer, of key/value heads only; sums of dk and dv travel in fp32.

With few hops a block is sent and computed in several parts: the first one is used while the others arrive, and goes
on while the others compute. Otherwise the only hop of two ranks would have to wait for the whole block.
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
from pypar.context_parallel.layouts import cut, num_positions
from pypar.context_parallel.masks import Piece, pieces
from pypar.context_parallel.partial import add_backward, add_forward, empty_sums, finish, sinks_share
from pypar.context_parallel.route import KEYS, SUMS, RankRoute, Transfer, rank_route
from pypar.ops.rows import accumulate_dtype

_TAG = 1 << 26  # apart from the tags of sends that the caller makes on the same group


def ring(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`."""
    refuse_options("ring", call.method_options)
    return _Ring.apply(q, k, v, call.sinks, call.bias, call)  # type: ignore[no-untyped-call]


METHODS = {"ring": ring}

_MOST_STEPS = 4  # that a walk is split into by parts of blocks, where hops are fewer
# Of a part. Over fewer keys attention is slower: 2 ranks with 8,192 tokens in bf16 reached 80, 88 and 91 % of the ideal
# with parts of 1,024, 2,048 and 4,096.
_LEAST_POSITIONS = 4096


def num_parts(size: int, positions: int) -> int:
    """Of a block of so many positions, on an axis of `size` ranks."""
    wanted = -(-_MOST_STEPS // max(size - 1, 1))
    return max(1, min(wanted, positions // _LEAST_POSITIONS))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        rank, size = call.axis.rank, call.axis.size
        route = rank_route(call.queries, call.keys, call.mask, rank)
        walk = _Walk("forward", route, k, v, call)
        sums = empty_sums(q, v)
        kept: list[Tensor] = []
        for hop in range(size):
            source = (rank - hop) % size
            for step in walk.steps(hop):
                walk.start([(t, part) for part in step for t in route.forward[hop]])
                if hop in route.hops:
                    add_forward(walk.pieces(source, step), q, *walk.block(source, step), sums, call)
            if hop == route.hops[-1] and hop > 0:
                kept = walk.keys[source]  # where backward begins
            walk.leave(hop)
        walk.finish()
        out, lse = finish(sums, sinks, q.dtype)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse, *kept)
        ctx.set_materialize_grads(False)
        ctx.call = replace(call, sinks=None, bias=None)  # autograd keeps the tensors
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse, *kept = ctx.saved_tensors
        call = replace(ctx.call, bias=bias)
        rank, size = call.axis.rank, call.axis.size
        route = rank_route(call.queries, call.keys, call.mask, rank)
        walk = _Walk("backward", route, k, v, call)
        if kept:
            walk.keys[(rank - route.hops[-1]) % size] = kept
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        wide = accumulate_dtype(q)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dbias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[4] else None
        results = (dout, out, lse, dlse)
        for hop in reversed(range(size)):
            source = (rank - hop) % size
            for step in walk.steps(hop):
                walk.start(walk.batch(hop, step))
                if hop in route.hops:
                    operands = (q, *walk.block(source, step))
                    into = walk.empty_share(source, step)
                    add_backward(walk.pieces(source, step), operands, results, (dq, *into), dbias, call)
                    walk.add_arrived(source, step, into)
            walk.leave(hop)
        dk, dv = into  # the own block comes last
        walk.finish()
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
    """The buffers that a rank holds on its way through the hops, by the rank whose block it is.

    keys: the parts of a block's k and v; the rank's own is there where it is to be sent. sums: by block and part,
    the gradients of other ranks' blocks, until they are sent.
    A step is the parts that are computed at once: all of the rank's own block, one of another's.
    """

    def __init__(self, direction: str, route: RankRoute, k: Tensor, v: Tensor, call: Call) -> None:
        self._direction, self._call, self._own, self._hop = direction, call, (k, v), 0
        self._rounds = route.forward if direction == "forward" else route.backward
        self._num_parts = num_parts(call.axis.size, max(num_positions(part) for part in call.keys))
        self.keys: dict[int, list[Tensor]] = {}
        self.sums: dict[tuple[int, int], Tensor] = {}
        self._arriving: dict[tuple[str, int, int], Handle] = {}
        self._sent: list[Handle] = []
        self._sent_before: list[Handle] = []  # in the hop before this one
        rank = call.axis.rank
        outgoing = [t for transfers in self._rounds for t in transfers if t.kind == KEYS and t.sender == rank]
        self._sent_on = {t.source for t in outgoing}
        if rank in self._sent_on:
            spans = [self._span(rank, part) for part in range(self._num_parts)]
            # One buffer, so that one message carries both.
            self.keys[rank] = [
                torch.cat([x.detach().narrow(-3, a, b - a).reshape(-1) for x in (k, v)]) for a, b in spans
            ]

    def steps(self, hop: int) -> list[tuple[int, ...]]:
        parts = tuple(range(self._num_parts))
        self._hop = hop
        return [parts] if hop == 0 else [(part,) for part in parts]

    def batch(self, hop: int, step: tuple[int, ...]) -> list[tuple[Transfer, int]]:
        """What of the backward's table starts before a step.

        Sums of a part leave as soon as they are there: before the step that follows the one that computed them.
        """
        if step[0] == 0:
            before = [(t, self._num_parts - 1) for t in self._rounds[hop] if t.kind == SUMS]
        else:
            before = [(t, step[0] - 1) for t in self._rounds[hop - 1] if t.kind == SUMS]
        return [(t, part) for part in step for t in self._rounds[hop] if t.kind == KEYS] + before

    def block(self, source: int, step: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Views [.., S, G, H] and [.., S, G, Hv] of the parts of a rank's block, once they have arrived."""
        if source == self._call.axis.rank:
            return self._own
        return self._unpack(self._keys(source, step[0]), source, step[0])

    def pieces(self, source: int, step: tuple[int, ...]) -> tuple[Piece, ...]:
        call = self._call
        rank = call.axis.rank
        if source == rank or self._num_parts == 1:
            return call.pieces(rank, source)
        keys = cut(call.keys[source], *self._span(source, step[0]))
        return pieces(call.queries[rank], keys, call.mask, call.merges)

    def empty_share(self, source: int, step: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Zeros for dk and dv of the own block, or of a part of another rank's."""
        if source == self._call.axis.rank:
            wide = accumulate_dtype(self._own[0])
            dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in self._own)
            return dk, dv
        share = self._buffer(SUMS, source, step[0]).zero_()
        self.sums[source, step[0]] = share
        return self._unpack(share, source, step[0])

    def add_arrived(self, source: int, step: tuple[int, ...], into: tuple[Tensor, Tensor]) -> None:
        """What the ranks before added to dk and dv came while this one computed."""
        for part in step:
            if (SUMS, source, part) not in self._arriving:
                continue
            with self._named():
                sums = self._arriving.pop((SUMS, source, part)).wait()
            arrived = self._unpack(sums, source, part)
            begin, end = self._span(source, part) if len(step) == self._num_parts else (0, None)
            for x, y in zip(into, arrived, strict=True):
                x[..., begin:end, :, :].add_(y)

    def start(self, transfers: list[tuple[Transfer, int]]) -> None:
        """Sends and receives parts of blocks."""
        rank = self._call.axis.rank
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[tuple[str, int, int]] = []
        for transfer, part in transfers:
            kind, source = transfer.kind, transfer.source
            if transfer.sender == rank:
                x = self._keys(source, part) if kind == KEYS else self.sums.pop((source, part))
                sends.append((x, transfer.receiver))
            else:
                receives.append((self._buffer(kind, source, part), transfer.sender))
                arriving.append((kind, source, part))
        with self._named():
            sent, received = exchange_start(sends, receives, self._call.axis, _TAG)
        self._sent = [handle for handle in self._sent if not self._let_go(handle)] + sent
        self._arriving.update(zip(arriving, received, strict=True))

    def leave(self, hop: int) -> None:
        """Let go of what the hop before sent, and of the blocks that are not needed any more."""
        self._wait(self._sent_before)
        self._sent_before, self._sent = self._sent, []
        rank, size = self._call.axis.rank, self._call.axis.size
        done = {t.source for t in self._rounds[hop] if t.kind == KEYS and t.sender == rank}
        for source in done | ({(rank - hop) % size} - self._sent_on):
            self.keys.pop(source, None)

    def finish(self) -> None:
        self._wait(self._sent_before)

    def _let_go(self, handle: Handle) -> bool:
        """Whether it is done; then its memory is free."""
        if not handle.is_done():
            return False
        self._wait([handle])
        return True

    def _wait(self, handles: list[Handle]) -> None:
        with self._named():
            for handle in handles:
                handle.wait()

    def _keys(self, source: int, part: int) -> Tensor:
        """Of a block that is here or arriving, in the order of its parts."""
        handle = self._arriving.pop((KEYS, source, part), None)
        if handle is not None:
            with self._named():
                self.keys.setdefault(source, []).append(handle.wait())
        return self.keys[source][part]

    def _unpack(self, block: Tensor, source: int, part: int) -> tuple[Tensor, Tensor]:
        shapes = [self._shape(x, source, part) for x in self._own]
        split = torch.Size(shapes[0]).numel()
        return block[:split].view(shapes[0]), block[split:].view(shapes[1])

    def _buffer(self, kind: str, source: int, part: int) -> Tensor:
        k = self._own[0]
        size = sum(torch.Size(self._shape(x, source, part)).numel() for x in self._own)
        return torch.empty(size, dtype=k.dtype if kind == KEYS else accumulate_dtype(k), device=k.device)

    def _shape(self, x: Tensor, source: int, part: int) -> tuple[int, ...]:
        """Of a part of x, k or v, of another rank."""
        begin, end = self._span(source, part)
        return (*x.shape[:-3], end - begin, *x.shape[-2:])

    def _span(self, source: int, part: int) -> tuple[int, int]:
        """Where a part of a block begins and ends."""
        count = num_positions(self._call.keys[source])
        return count * part // self._num_parts, count * (part + 1) // self._num_parts

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the communication tells where the ring was."""
        try:
            yield
        except RuntimeError as error:
            axis = self._call.axis
            raise RuntimeError(
                f"ring attention, {self._direction}, hop {self._hop} of {axis.size - 1} on rank {axis.rank} of "
                f"axis {axis.name!r}: {error}"
            ) from error
