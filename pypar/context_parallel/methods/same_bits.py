"""Calls of the op on some rows of a whole, made so that a row gets the bits which the call of the whole gives it.

The native backend sums the keys of a sequence in blocks counted from its first key, and takes calls of few rows
another way. So the keys that a call is given begin where such a block begins, and rows too few for the way of the
whole are made more by rows of zeros, whose results are thrown away.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from pypar.context_parallel.call import Call
from pypar.context_parallel.masks import Mask, Piece
from pypar.context_parallel.methods.blockwise import Pieces, add_backward, forward_once

KEY_BLOCK = 1536
"""A multiple of every native kernel's blocks of keys: 96, 128 and, where sums are kept apart, 1536.

csrc/attention/cpu/tile_scheduler.h has them."""
FEW_ROWS = 16
"""So many rows of one key/value head are few (kDecodeRows there): positions times the query heads that share it."""


def as_whole(pieces: Pieces, mask: Mask, heads: int) -> Pieces:
    """The pieces as the op must be called with them to sum as it does for the whole. heads: N / G query heads."""
    if not _is_few(mask.length_q, len(mask.queries) - 1, heads):
        pieces = tuple(narrow for piece in pieces for narrow in _without_few(piece, heads))
    return tuple(_from_block(piece) for piece in pieces)


def forward(
    pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor, Tensor], call: Call
) -> bool:
    """`forward_once` of pieces from `as_whole`."""
    makes_rest = False
    for piece in pieces:
        more = _missing_rows(piece, q, k, call)
        if not more:
            makes_rest |= forward_once((piece,), q, k, v, results, call)
            continue
        wide = replace(piece, rows=slice(0, _num_rows(piece) + more))
        out, lse, rest = results
        padded = (_more(out, piece, -3, more), _more(lse, piece, -1, more), _more(rest, piece, -1, more))
        call_wide = replace(call, bias=_more_bias(call.bias, piece, more))
        makes_rest |= forward_once((wide,), _more(q, piece, -3, more), k, v, padded, call_wide)
        for dim, held, made in zip((-3, -1, -1), results, padded, strict=True):
            _rows(held, piece, dim).copy_(made.narrow(dim, 0, _num_rows(piece)))
    return makes_rest


def backward(
    pieces: Pieces,
    operands: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    into: tuple[Tensor, Tensor, Tensor],
    dbias: Tensor | None,
    call: Call,
    lse_rest: Tensor | None,
) -> None:
    """`add_backward` of pieces from `as_whole`."""
    (q, k, v), (dout, out, lse, dlse), (dq, dk, dv) = operands, results, into
    for piece in pieces:
        more = _missing_rows(piece, q, k, call)
        if not more:
            add_backward((piece,), operands, results, into, dbias, call, lse_rest)
            continue
        wide = replace(piece, rows=slice(0, _num_rows(piece) + more))
        padded = (
            _more(dout, piece, -3, more),
            _more(out, piece, -3, more),
            _more(lse, piece, -1, more, -math.inf),  # of a row that sees nothing: no gradient comes from it
            None if dlse is None else _more(dlse, piece, -1, more),
        )
        wide_totals = (_more(dq, piece, -3, more), dk, dv)
        wide_dbias = _more_bias(dbias, piece, more)
        add_backward(
            (wide,),
            (_more(q, piece, -3, more), k, v),
            padded,
            wide_totals,
            wide_dbias,
            replace(call, bias=_more_bias(call.bias, piece, more)),
            None if lse_rest is None else _more(lse_rest, piece, -1, more),
        )
        _rows(dq, piece, -3).copy_(wide_totals[0].narrow(-3, 0, _num_rows(piece)))
        if dbias is not None and wide_dbias is not None and wide_dbias is not dbias:
            _rows(dbias, piece, -2).copy_(wide_dbias.narrow(-2, 0, _num_rows(piece)))


def _num_rows(piece: Piece) -> int:
    return piece.rows.stop - piece.rows.start


def _is_few(positions: int, sequences: int, heads: int) -> bool:
    return positions * heads <= FEW_ROWS * sequences


def _without_few(piece: Piece, heads: int) -> list[Piece]:
    """A piece of several documents in pieces that hold one of few rows, or others: they have more in the whole."""
    if piece.cu_seqlens_q is None:
        return [piece]
    lengths = [b - a for a, b in itertools.pairwise(piece.cu_seqlens_q)]
    runs: list[tuple[int, int]] = []
    for i, length in enumerate(lengths):
        if length == 0:
            continue
        joins = runs and runs[-1][1] == i and not any(_is_few(lengths[j], 1, heads) for j in (i - 1, i))
        if joins:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return [piece] if runs == [(0, len(lengths))] else [_of_documents(piece, *run) for run in runs]


def _of_documents(piece: Piece, first: int, end: int) -> Piece:
    ends_q, ends_k = (ends[first : end + 1] for ends in (piece.cu_seqlens_q or (), piece.cu_seqlens_k or ()))
    rows, keys = (
        slice(span.start + ends[0], span.start + ends[-1])
        for span, ends in ((piece.rows, ends_q), (piece.keys, ends_k))
    )
    at = replace(piece.positions, batch_start=piece.positions.batch_start + first)
    if end == first + 1:
        return Piece(rows, keys, at, piece.masked, piece.pairs)
    ends_q, ends_k = (tuple(x - ends[0] for x in ends) for ends in (ends_q, ends_k))
    return Piece(rows, keys, at, piece.masked, piece.pairs, ends_q, ends_k)


def _from_block(piece: Piece) -> Piece:
    """The piece with its keys from the last multiple of KEY_BLOCK of its document on; the mask hides the new ones."""
    before = piece.positions.k_start % KEY_BLOCK
    if before == 0:
        return piece
    return replace(
        piece,
        keys=slice(piece.keys.start - before, piece.keys.stop),
        positions=replace(piece.positions, k_start=piece.positions.k_start - before),
        masked=True,
    )


def _missing_rows(piece: Piece, q: Tensor, k: Tensor, call: Call) -> int:
    """How many rows a call with the piece lacks that is not to be one of few rows, where the whole is not."""
    heads = q.shape[-2] // k.shape[-2]
    if _is_few(call.mask.length_q, len(call.mask.queries) - 1, heads):
        return 0
    few = piece.cu_seqlens_q is None and _is_few(_num_rows(piece), 1, heads)
    return FEW_ROWS // heads + 1 - _num_rows(piece) if few else 0


def _rows(x: Tensor, piece: Piece, dim: int) -> Tensor:
    return x.narrow(dim, piece.rows.start, _num_rows(piece))


def _more(x: Tensor, piece: Piece, dim: int, count: int, value: float = 0.0) -> Tensor:
    """The piece's rows of x and `count` of `value` behind them."""
    rows = _rows(x, piece, dim)
    shape = list(rows.shape)
    shape[dim] = count
    return torch.cat([rows, rows.new_full(shape, value)], dim)


def _more_bias(bias: Tensor | None, piece: Piece, count: int) -> Tensor | None:
    """`_more` of bias [B|1, N|1, T|1, S|1] or its gradient; the bias itself where it is one for all rows."""
    return bias if bias is None or bias.shape[2] == 1 else _more(bias, piece, -2, count)
