"""The buffers of one rank on its way through the hops of a ring, and the transfers that fill and empty them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pypar.comm import Handle, exchange_start
from pypar.context_parallel.call import Call
from pypar.context_parallel.layouts import cut, num_positions
from pypar.context_parallel.masks import Piece, pieces
from pypar.context_parallel.methods.ring.parts import Part, Round
from pypar.context_parallel.methods.ring.route import KEYS, SUMS, RankRoute, Transfer
from pypar.ops.rows import accumulate_dtype

_TAG = 1 << 26  # apart from the tags of sends that the caller makes on the same group

Moves = list[tuple[Transfer, Part]]
Block = tuple[Tensor, Tensor]


class RingBuffers:
    """One round. k, v: the rank's own. A block is known by the rank whose it is; all of them have the same parts.

    _keys: parts of k and v that are here; of the own block only where it is sent, as one buffer, so that one
    message carries both. _sums: the gradients of other ranks' parts, until they are sent.
    """

    def __init__(
        self, direction: str, route: RankRoute, round_: Round, k: Tensor, v: Tensor, call: Call
    ) -> None:
        self._route, self.whole, self.parts = route, round_.whole, round_.parts
        self._direction, self._call, self._own = direction, call, (k.detach(), v.detach())
        self._rank, self._size = call.axis.rank, call.axis.size
        self._rounds = route.forward if direction == "forward" else route.backward
        order = range(self._size)
        self._order = order if direction == "forward" else order[::-1]
        self._hop = self._order[0]
        self._last_source = (self._rank - route.hops[-1]) % self._size
        self._last_use = self._last_uses()
        self._keys: dict[tuple[int, Part], Tensor] = {}
        self._sums: dict[tuple[int, Part], Tensor] = {}
        self._arriving: dict[tuple[str, int, Part], Handle] = {}
        self._sent: list[Handle] = []

    def hops(self) -> Iterator[int]:
        """In their order; the methods below are about the one that was given last, and the block it is about.

        What a hop sends is waited for after the next one.
        """
        before: list[Handle] = []
        for hop in self._order:
            self._hop = hop
            yield hop
            self._wait(before)
            before, self._sent = self._sent, []
        self._wait(before)

    @property
    def sees(self) -> bool:
        """Whether the rank's queries see something of the block."""
        return self._hop in self._route.hops

    def outgoing(self, part: Part) -> Moves:
        """What of the forward's table starts before a part is computed."""
        parts = self.parts if part is self.whole else (part,)
        return [(t, p) for p in parts for t in self._rounds[self._hop]]

    def incoming(self, part: Part) -> Moves:
        """What of the backward's table starts before a part is computed.

        Sums of a part leave as soon as they are there: before the part that follows the one that made them.
        """
        index, hop = self.parts.index(part), self._hop
        before = self._rounds[hop] if index == 0 else self._rounds[hop - 1] if hop > 0 else ()
        sums = [(t, self.parts[index - 1]) for t in before if t.kind == SUMS]
        return [(t, part) for t in self._rounds[hop] if t.kind == KEYS] + sums

    def block(self, part: Part) -> Block:
        """Views [.., S, G, H] and [.., S, G, Hv] of a part, once it has arrived."""
        if self._source == self._rank:
            k, v = (self.cut(x, part) for x in self._own)
            return k, v
        return self._unpack(self._arrived(self._source, part), self._source, part)

    def pieces(self, part: Part) -> tuple[Piece, ...]:
        call = self._call
        if part.has_all_keys:
            return call.pieces(self._rank, self._source)
        held = call.keys[self._source]
        keys = cut(held, *part.span(num_positions(held)))
        return pieces(call.queries[self._rank], keys, call.mask, call.merges)

    def cut(self, x: Tensor, part: Part) -> Tensor:
        """A view of the part of x, shaped as the rank's own k or v."""
        begin, end = part.span(x.shape[-3])
        return x[..., begin:end, part.heads.groups, :]

    def empty_share(self, part: Part) -> Block:
        """Zeros for dk and dv of a part."""
        share = self._buffer(SUMS, self._source, part).zero_()
        if self._source != self._rank:
            self._sums[self._source, part] = share
        return self._unpack(share, self._source, part)

    def has_arrived(self, part: Part) -> bool:
        """Whether `add_arrived` need not wait."""
        handle = self._arriving.get((SUMS, self._source, part))
        return handle is None or handle.is_done()

    def add_arrived(self, part: Part, into: Block) -> None:
        """What the ranks before added to dk and dv came while this one computed."""
        handle = self._arriving.pop((SUMS, self._source, part), None)
        if handle is None:
            return
        with self._named():
            arrived = self._unpack(handle.wait(), self._source, part)
        for x, y in zip(into, arrived, strict=True):
            x.add_(y)

    def start(self, moves: Moves) -> None:
        """Sends and receives parts of blocks."""
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[tuple[str, int, Part]] = []
        for transfer, part in moves:
            kind, source = transfer.kind, transfer.source
            if transfer.sender == self._rank:
                x = self._arrived(source, part) if kind == KEYS else self._sums.pop((source, part))
                sends.append((x, transfer.receiver))
            else:
                receives.append((self._buffer(kind, source, part), transfer.sender))
                arriving.append((kind, source, part))
        with self._named():
            sent, received = exchange_start(sends, receives, self._call.axis, _TAG)
        self._sent = [handle for handle in self._sent if not self._let_go(handle)] + sent
        self._arriving.update(zip(arriving, received, strict=True))

    def release(self, part: Part) -> None:
        """The hop is done with this part: blocks that no later one needs. What is being sent is kept by its handle."""
        for source, hop in self._last_use.items():
            if hop == self._hop:
                self._keys.pop((source, part), None)

    def kept(self) -> list[Tensor]:
        """The parts of the block of the rank's highest hop, after the forward."""
        return (
            [] if self._last_source == self._rank else [self._keys[self._last_source, p] for p in self.parts]
        )

    def keep(self, kept: Sequence[Tensor]) -> None:
        """For the backward: what `kept` returned."""
        self._keys.update({(self._last_source, part): x for part, x in zip(self.parts, kept, strict=False)})

    @property
    def _source(self) -> int:
        """The rank whose block it is."""
        return (self._rank - self._hop) % self._size

    def _last_uses(self) -> dict[int, int]:
        """Of the other ranks' blocks, in which hop each is used or sent on last; not of the one that is kept."""
        found = {}
        for hop in self._order:
            if hop in self._route.hops:
                found[(self._rank - hop) % self._size] = hop
            sent = [t for t in self._rounds[hop] if t.kind == KEYS and t.sender == self._rank]
            found.update({t.source: hop for t in sent})
        staying = {self._rank} | ({self._last_source} if self._direction == "forward" else set())
        return {source: hop for source, hop in found.items() if source not in staying}

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

    def _arrived(self, source: int, part: Part) -> Tensor:
        """k and v of a part as one buffer."""
        if source == self._rank:
            return torch.cat([self.cut(x, part).reshape(-1) for x in self._own])
        handle = self._arriving.pop((KEYS, source, part), None)
        if handle is not None:
            with self._named():
                self._keys[source, part] = handle.wait()
        return self._keys[source, part]

    def _unpack(self, block: Tensor, source: int, part: Part) -> Block:
        k, v = (self._shape(x, source, part) for x in self._own)
        split = torch.Size(k).numel()
        return block[:split].view(k), block[split:].view(v)

    def _buffer(self, kind: str, source: int, part: Part) -> Tensor:
        k = self._own[0]
        size = sum(torch.Size(self._shape(x, source, part)).numel() for x in self._own)
        return torch.empty(size, dtype=k.dtype if kind == KEYS else accumulate_dtype(k), device=k.device)

    def _shape(self, x: Tensor, source: int, part: Part) -> tuple[int, ...]:
        """Of a part of a rank's k or v, that are like x, this rank's."""
        begin, end = part.span(num_positions(self._call.keys[source]))
        groups = part.heads.groups
        return (*x.shape[:-3], end - begin, groups.stop - groups.start, x.shape[-1])

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
