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
from pypar.context_parallel.methods.ring.route import KEYS, SUMS, RankRoute, Transfer
from pypar.context_parallel.methods.ring.sub_blocks import Round, SubBlock
from pypar.ops.rows import accumulate_dtype

_TAG = 1 << 26  # apart from the tags of sends that the caller makes on the same group

Moves = list[tuple[Transfer, SubBlock]]
Block = tuple[Tensor, Tensor]


class RingBuffers:
    """The buffers of one round. k, v: the rank's own. A block is known by the rank that holds it; all of them have the
    same sub-blocks.

    _keys: sub-blocks of k and v that are here; of the own block only where it is sent, as one buffer, so that one
    message carries both. _sums: the gradients of other ranks' sub-blocks, until they are sent.
    """

    def __init__(
        self, direction: str, route: RankRoute, round_: Round, k: Tensor, v: Tensor, call: Call
    ) -> None:
        self._route, self.whole, self.sub_blocks = route, round_.whole, round_.sub_blocks
        self._direction, self._call, self._own = direction, call, (k.detach(), v.detach())
        self._rank, self._size = call.axis.rank, call.axis.size
        self._transfers = route.forward if direction == "forward" else route.backward
        order = range(self._size)
        self._order = order if direction == "forward" else order[::-1]
        self._hop = self._order[0]
        self._last_source = (self._rank - route.hops[-1]) % self._size
        self._last_use = self._last_uses()
        self._keys: dict[tuple[int, SubBlock], Tensor] = {}
        self._sums: dict[tuple[int, SubBlock], Tensor] = {}
        self._arriving: dict[tuple[str, int, SubBlock], Handle] = {}
        self._sent: list[Handle] = []

    def hops(self) -> Iterator[int]:
        """The hops in their order; the methods below are about the hop that was given last, and its block.

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

    def outgoing(self, sub_block: SubBlock) -> Moves:
        """What of the forward's table starts before a sub-block is computed."""
        sub_blocks = self.sub_blocks if sub_block is self.whole else (sub_block,)
        return [(t, each) for each in sub_blocks for t in self._transfers[self._hop]]

    def incoming(self, sub_block: SubBlock) -> Moves:
        """What of the backward's table starts before a sub-block is computed.

        Sums of a sub-block leave as soon as they are there: before the one that follows is computed.
        """
        index, hop = self.sub_blocks.index(sub_block), self._hop
        before = self._transfers[hop] if index == 0 else self._transfers[hop - 1] if hop > 0 else ()
        sums = [(t, self.sub_blocks[index - 1]) for t in before if t.kind == SUMS]
        return [(t, sub_block) for t in self._transfers[hop] if t.kind == KEYS] + sums

    def block(self, sub_block: SubBlock) -> Block:
        """Views [.., S, G, H] and [.., S, G, Hv] of a sub-block, once it has arrived."""
        if self._source == self._rank:
            k, v = (self.cut(x, sub_block) for x in self._own)
            return k, v
        return self._unpack(self._arrived(self._source, sub_block), self._source, sub_block)

    def pieces(self, sub_block: SubBlock) -> tuple[Piece, ...]:
        call = self._call
        if sub_block.has_all_keys:
            return call.pieces(self._rank, self._source)
        held = call.keys[self._source]
        keys = cut(held, *sub_block.span(num_positions(held)))
        return pieces(call.queries[self._rank], keys, call.mask, call.merges)

    def cut(self, x: Tensor, sub_block: SubBlock) -> Tensor:
        """A view of the sub-block of x, which is shaped as the rank's own k or v."""
        begin, end = sub_block.span(x.shape[-3])
        return x[..., begin:end, sub_block.heads.groups, :]

    def empty_share(self, sub_block: SubBlock) -> Block:
        """Zeros for dk and dv of a sub-block."""
        share = self._buffer(SUMS, self._source, sub_block).zero_()
        if self._source != self._rank:
            self._sums[self._source, sub_block] = share
        return self._unpack(share, self._source, sub_block)

    def has_arrived(self, sub_block: SubBlock) -> bool:
        """Whether `add_arrived` need not wait."""
        handle = self._arriving.get((SUMS, self._source, sub_block))
        return handle is None or handle.is_done()

    def add_arrived(self, sub_block: SubBlock, into: Block) -> None:
        """What the ranks before added to dk and dv came while this one computed."""
        handle = self._arriving.pop((SUMS, self._source, sub_block), None)
        if handle is None:
            return
        with self._named():
            arrived = self._unpack(handle.wait(), self._source, sub_block)
        for x, y in zip(into, arrived, strict=True):
            x.add_(y)

    def start(self, moves: Moves) -> None:
        """Send and receive sub-blocks."""
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[tuple[str, int, SubBlock]] = []
        for transfer, sub_block in moves:
            kind, source = transfer.kind, transfer.source
            if transfer.sender == self._rank:
                x = self._arrived(source, sub_block) if kind == KEYS else self._sums.pop((source, sub_block))
                sends.append((x, transfer.receiver))
            else:
                receives.append((self._buffer(kind, source, sub_block), transfer.sender))
                arriving.append((kind, source, sub_block))
        with self._named():
            sent, received = exchange_start(sends, receives, self._call.axis, _TAG)
        self._sent = [handle for handle in self._sent if not self._let_go(handle)] + sent
        self._arriving.update(zip(arriving, received, strict=True))

    def release(self, sub_block: SubBlock) -> None:
        """Let go of what no later hop needs of this sub-block. What is being sent is kept by its handle."""
        for source, hop in self._last_use.items():
            if hop == self._hop:
                self._keys.pop((source, sub_block), None)

    def kept(self) -> list[Tensor]:
        """The sub-blocks of the block of the rank's highest hop, after the forward."""
        return (
            []
            if self._last_source == self._rank
            else [self._keys[self._last_source, each] for each in self.sub_blocks]
        )

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Take over, for the backward, what `kept` returned."""
        found = zip(self.sub_blocks, kept, strict=False)
        self._keys.update({(self._last_source, sub_block): x for sub_block, x in found})

    @property
    def _source(self) -> int:
        """The rank whose block the hop is about."""
        return (self._rank - self._hop) % self._size

    def _last_uses(self) -> dict[int, int]:
        """In which hop each other rank's block is used or sent on last; without the block that is kept."""
        found = {}
        for hop in self._order:
            if hop in self._route.hops:
                found[(self._rank - hop) % self._size] = hop
            sent = [t for t in self._transfers[hop] if t.kind == KEYS and t.sender == self._rank]
            found.update({t.source: hop for t in sent})
        staying = {self._rank} | ({self._last_source} if self._direction == "forward" else set())
        return {source: hop for source, hop in found.items() if source not in staying}

    def _let_go(self, handle: Handle) -> bool:
        """Whether the transfer is done; then its memory is free."""
        if not handle.is_done():
            return False
        self._wait([handle])
        return True

    def _wait(self, handles: list[Handle]) -> None:
        with self._named():
            for handle in handles:
                handle.wait()

    def _arrived(self, source: int, sub_block: SubBlock) -> Tensor:
        """k and v of a sub-block as one buffer."""
        if source == self._rank:
            return torch.cat([self.cut(x, sub_block).reshape(-1) for x in self._own])
        handle = self._arriving.pop((KEYS, source, sub_block), None)
        if handle is not None:
            with self._named():
                self._keys[source, sub_block] = handle.wait()
        return self._keys[source, sub_block]

    def _unpack(self, block: Tensor, source: int, sub_block: SubBlock) -> Block:
        k, v = (self._shape(x, source, sub_block) for x in self._own)
        split = torch.Size(k).numel()
        return block[:split].view(k), block[split:].view(v)

    def _buffer(self, kind: str, source: int, sub_block: SubBlock) -> Tensor:
        k = self._own[0]
        size = sum(torch.Size(self._shape(x, source, sub_block)).numel() for x in self._own)
        return torch.empty(size, dtype=k.dtype if kind == KEYS else accumulate_dtype(k), device=k.device)

    def _shape(self, x: Tensor, source: int, sub_block: SubBlock) -> tuple[int, ...]:
        """The shape of a sub-block of another rank's k or v, where x is this rank's."""
        begin, end = sub_block.span(num_positions(self._call.keys[source]))
        groups = sub_block.heads.groups
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
