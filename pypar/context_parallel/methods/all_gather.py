"""Context parallelism by gathering: keys and values of the whole sequence, a few heads at a time.

While some heads compute, the next ones are being gathered (Llama 3, arXiv 2407.21783, section 3.3.2, gathers all at
once and first); backward gathers them again and scatters the sums of their gradients.

Every rank then sees its queries' keys in the order in which one device sees them. With the native backend and a
layout of chunks (contiguous, zigzag) out, lse and dq have the bits of one device, for any lengths, masks and options,
but for
- a whole of few rows: at most 16 of each key/value head (positions times the query heads that share it), on average of
  the documents where there are some; and documents of so few rows that see 192 keys or more;
- dq in fp16 where the CPU has products in fp16: a few last bits. The power of two that its terms are multiplied by is
  found from all rows of a head that are there.
dk and dv are summed over the ranks, in another order. The stripes of a layout are finished block by block, and the
reference's bits are those of torch's matrix products, which promise nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pypar.comm import Handle, all_gather_start, reduce_scatter_start
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.layouts import Segment, num_positions, positions_in
from pypar.context_parallel.masks import Piece, pieces
from pypar.context_parallel.methods import same_bits
from pypar.context_parallel.methods.blockwise import (
    add_backward,
    add_forward,
    empty_sums,
    finish,
    sinks_share,
)
from pypar.context_parallel.methods.heads import HeadGroup
from pypar.ops.calls import called
from pypar.ops.rows import accumulate_dtype
from pypar.ops.uncompiled import uncompiled


def all_gather(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`. Option heads_at_once: how many key/value heads one gather brings; 1 unless given."""
    refuse_options("all_gather", call.method_options, ("heads_at_once",))
    at_once = call.method_options.get("heads_at_once", 1)
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"heads_at_once ({at_once}) must be a whole number, at least 1")
    return _AllGather.apply(q, k, v, call.sinks, call.bias, call, at_once)  # type: ignore[no-untyped-call]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        call: Call,
        at_once: int,
    ) -> tuple[Tensor, Tensor]:

        def compute() -> Results:
            gathered = _Gathered(q, k, v, call, at_once, "forward")
            run = _forward_once if gathered.in_order else _forward_by_rank
            return run(gathered, q, v, call)

        out, lse, lse_rest = called("attention", (q, k, v, sinks, bias), compute)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse, lse_rest)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.at_once = replace(call, sinks=None, bias=None), at_once  # autograd keeps the tensors
        return out, lse

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse, lse_rest = ctx.saved_tensors
        call = replace(ctx.call, bias=bias)
        dout = torch.zeros_like(out) if dout is None else dout
        wide = accumulate_dtype(q)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dk, dv = (torch.empty(x.shape, dtype=wide, device=q.device) for x in (k, v))
        dbias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[4] else None
        gathered = _Gathered(q, k, v, call, ctx.at_once, "backward")
        for heads in gathered.in_turn():
            rows = heads.rows
            results = (dout[rows], out[rows], lse[rows], None if dlse is None else dlse[rows])
            share = heads.bias(dbias)
            sums = gathered.empty_sums(wide)
            for block, into in zip(gathered.blocks(), gathered.blocks(sums), strict=True):
                seen, k_here, v_here = block
                _, dk_here, dv_here = into
                operands, totals = (q[rows], k_here, v_here), (dq[rows], dk_here, dv_here)
                rest = None if lse_rest is None else lse_rest[rows]
                add = same_bits.backward if gathered.in_order else add_backward
                add(seen, operands, results, totals, share, heads.call(call), rest)
            gathered.scatter(sums, dk[..., heads.groups, :], dv[..., heads.groups, :])
        gathered.arrive()
        dsinks = sinks_share(sinks, dout, out, lse, dlse) if ctx.needs_input_grad[3] else None
        return (
            *(x.to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v))),
            dsinks,
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


Results = tuple[Tensor, Tensor, Tensor | None]
"""out, lse, and what rounding took off lse where the backend says it."""


def _forward_once(gathered: _Gathered, q: Tensor, v: Tensor, call: Call) -> Results:
    """All keys are one block, so every row is finished by one call of the op, as on one device."""
    *batch, T, N, _ = q.shape
    out = q.new_zeros((*batch, T, N, v.shape[-1]))
    lse = empty_sums(q, v)[1]
    if call.sinks is not None:
        lse.copy_(call.sinks.detach().unsqueeze(-1).expand_as(lse))  # of a row that sees nothing else
    lse_rest, makes_rest = torch.zeros_like(lse), False
    for heads in gathered.in_turn():
        rows = heads.rows
        for seen, k_here, v_here in gathered.blocks():
            results = (out[rows], lse[rows], lse_rest[rows])
            makes_rest |= same_bits.forward(seen, q[rows], k_here, v_here, results, heads.call(call))
    return out, lse, lse_rest if makes_rest else None


def _forward_by_rank(gathered: _Gathered, q: Tensor, v: Tensor, call: Call) -> Results:
    sums = empty_sums(q, v)
    for heads in gathered.in_turn():
        rows = heads.rows
        for seen, k_here, v_here in gathered.blocks():
            add_forward(seen, q[rows], k_here, v_here, (sums[0][rows], sums[1][rows]), heads.call(call))
    return *finish(sums, call.sinks, q.dtype), None


class _Gathered:
    """The keys and values of all ranks, some heads after the others; one gather ahead."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, at_once: int, direction: str) -> None:
        self._k, self._v, self._call, self._direction = k, v, call, direction
        rank = call.axis.rank
        self._counts = [num_positions(segments) for segments in call.keys]
        self._most = max(self._counts)  # all parts of one gather have one size
        rows = torch.cat([torch.arange(n) + r * self._most for r, n in enumerate(self._counts)])
        self.in_order = all(segment.step == 1 for segments in call.keys for segment in segments)
        if self.in_order:  # one block, the whole sequence as one device has it
            whole = (Segment(0, sum(self._counts)),) if self._most else ()
            of_whole = pieces(call.queries[rank], whole, call.mask, call.merges)
            self._pieces = [same_bits.as_whole(of_whole, call.mask, q.shape[-2] // k.shape[-2])]
            rows = rows[torch.cat([positions_in(segments) for segments in call.keys]).argsort()]
        else:  # one after the other, as the ranks hold them
            self._pieces = [call.pieces(rank, source) for source in range(call.axis.size)]
        self._rows = rows.to(k.device)  # of the padded parts
        N, G = q.shape[-2], k.shape[-2]
        chunks = [slice(g, min(g + at_once, G)) for g in range(0, G, at_once)]
        self._heads = [HeadGroup.of(N, G, groups) for groups in chunks]
        self._here = k
        self._scattered: list[tuple[Handle, Tensor, Tensor]] = []

    def in_turn(self) -> Iterator[HeadGroup]:
        """The heads whose keys and values `blocks` gives; the next ones are on their way meanwhile."""
        arriving = self._start(self._heads[0].groups)
        for heads, following in zip(self._heads, [*self._heads[1:], None], strict=True):
            with self._named(heads):
                self._here = arriving.wait().index_select(-3, self._rows)
                if following is not None:
                    arriving = self._start(following.groups)
            yield heads

    def blocks(self, x: Tensor | None = None) -> Iterator[tuple[tuple[Piece, ...], Tensor, Tensor]]:
        """(pieces, k, v) of each block that the rank's queries see; of x, shaped alike, instead of what is here."""
        x = self._here if x is None else x
        H, first = self._k.shape[-1], 0
        counts = [x.shape[-3]] if self.in_order else self._counts
        for seen, count in zip(self._pieces, counts, strict=True):
            block = x.narrow(-3, first, count)
            yield seen, block[..., :H], block[..., H:]
            first += count

    def empty_sums(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._here.shape, dtype=dtype, device=self._here.device)

    def scatter(self, sums: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Start adding up all ranks' sums; this rank's part goes to dk and dv when it has arrived."""
        padded = sums.new_zeros((*sums.shape[:-3], self._most * len(self._counts), *sums.shape[-2:]))
        padded.index_copy_(-3, self._rows, sums)
        self._scattered.append((reduce_scatter_start(padded, self._call.axis, padded.dim() - 3), dk, dv))

    def arrive(self) -> None:
        held = self._k.shape[-3]
        for (handle, dk, dv), heads in zip(self._scattered, self._heads, strict=True):
            with self._named(heads):
                part = handle.wait().narrow(-3, 0, held)
            dk.copy_(part[..., : dk.shape[-1]])
            dv.copy_(part[..., dk.shape[-1] :])

    def _start(self, groups: slice) -> Handle:
        x = torch.cat([self._k[..., groups, :], self._v[..., groups, :]], -1)
        if x.shape[-3] < self._most:
            x = torch.cat([x, x.new_zeros((*x.shape[:-3], self._most - x.shape[-3], *x.shape[-2:]))], -3)
        return all_gather_start(x, self._call.axis, x.dim() - 3)

    @contextlib.contextmanager
    def _named(self, heads: HeadGroup) -> Iterator[None]:
        """An error of the communication tells where it was."""
        axis = self._call.axis
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"all-gather attention, {self._direction}, key/value heads {heads.groups.start} to "
                f"{heads.groups.stop - 1} on rank {axis.rank} of axis {axis.name!r}: {error}"
            ) from error
