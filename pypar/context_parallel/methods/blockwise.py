"""Attention of a rank's queries over one block of keys after the other: the sums that every method runs.

Results stay in fp32 (fp64 for fp64) until the last key has been seen: rounded after each block, their error would
grow with the number of ranks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from pypar.context_parallel.call import Call
from pypar.context_parallel.masks import Piece
from pypar.ops.attention import BACKENDS, attention_forward
from pypar.ops.attention.arguments import AttentionProblem, attention_problem
from pypar.ops.attention.reference import sinks_gradient
from pypar.ops.backend import choose
from pypar.ops.rows import accumulate_dtype

Pieces = tuple[Piece, ...]


def empty_sums(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [.., T, N, Hv] and lse [.., N, T] over no keys yet."""
    wide = accumulate_dtype(q)
    *batch, T, N, _ = q.shape
    out = torch.zeros((*batch, T, N, v.shape[-1]), dtype=wide, device=q.device)
    return out, torch.full((*batch, N, T), -math.inf, dtype=wide, device=q.device)


def add_forward(
    pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor], call: Call
) -> None:
    """Continue `sums`, (out, lse) of all of q, by the keys of the pieces, in place."""
    for piece in pieces:
        out, lse = _rows(sums[0], piece, piece.rows), _lse_rows(sums[1], piece)
        attention_forward(_problem(piece, q, k, v, call), (out, lse), call.backend)


def forward_once(
    pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor, Tensor], call: Call
) -> bool:
    """Write what the op makes without a carry, in the bits of one device, with sinks. No two pieces may share a row.

    results: out in q's dtype, lse and what rounding took off lse, of all of q; rows of pieces are overwritten.
    Returns whether the backend makes the last of them.
    """
    makes_rest = False
    for piece in pieces:
        problem = replace(_problem(piece, q, k, v, call), sinks=_op_sinks(call, q))
        backend = choose("attention", BACKENDS, {"problem": problem}, call.backend)
        made = backend.forward(problem, None)
        _rows(results[0], piece, piece.rows).copy_(made.out)
        _lse_rows(results[1], piece).copy_(made.lse)
        if made.lse_rest is not None:
            _lse_rows(results[2], piece).copy_(made.lse_rest)
            makes_rest = True
    return makes_rest


def _op_sinks(call: Call, q: Tensor) -> Tensor | None:
    return None if call.sinks is None else call.sinks.detach().to(accumulate_dtype(q)).contiguous()


def add_backward(
    pieces: Pieces,
    operands: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    into: tuple[Tensor, Tensor, Tensor],
    dbias: Tensor | None,
    call: Call,
    lse_rest: Tensor | None = None,
) -> None:
    """Add the gradients of the pieces into fp32 (dq, dk, dv), shaped as q, k and v.

    operands: q, k, v. results: dout, final out and lse of q over all keys and sinks, dlse or None.
    dbias: fp32 like call.bias, added to; None where it is not wanted. lse_rest: as the backend's forward made it.
    """
    dout, out, lse, dlse = results
    for piece in pieces:
        problem = _problem(piece, *operands, call)
        scores = lse.new_zeros(problem.scores_shape) if dbias is not None else None
        backend = choose("attention", BACKENDS, {"problem": problem}, call.backend)
        assert backend.backward is not None
        spans = (piece.rows, piece.keys, piece.keys)
        backend.backward(
            problem,
            _rows(dout, piece, piece.rows),
            _rows(out, piece, piece.rows),
            _lse_rows(lse, piece),
            None if dlse is None else _lse_rows(dlse, piece),
            tuple(_rows(x, piece, span) for x, span in zip(into, spans, strict=True)),
            scores,
            None if lse_rest is None else _lse_rows(lse_rest, piece).contiguous(),
        )
        if dbias is not None and scores is not None:
            part = _bias(dbias, piece)
            part += scores.sum_to_size(part.shape)


def finish(sums: tuple[Tensor, Tensor], sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out in dtype, lse) once all keys were seen; the sinks take part here, as keys without a value."""
    out, lse = sums
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.detach().to(lse.dtype).unsqueeze(-1))
        out = out * (lse - total.masked_fill(total == -math.inf, 0.0)).exp().mT.unsqueeze(-1)
        lse = total
    return out.to(dtype), lse


def sinks_share(
    sinks: Tensor | None, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> Tensor | None:
    """These queries' share of the gradient of the sinks [N]."""
    if sinks is None:
        return None
    return sinks_gradient(sinks.detach().to(lse.dtype), dout, out, lse, dlse).to(sinks.dtype)


def _problem(piece: Piece, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionProblem:
    """The piece of q and of a block's k and v as a problem of the op. Sinks come last, in `finish`."""
    first, documents = piece.positions.batch_start, piece.num_documents
    ends = [None if x is None else _on_device(x, q.device) for x in (piece.cu_seqlens_q, piece.cu_seqlens_k)]
    slopes = call.alibi_slopes
    if slopes is not None and slopes.dim() == 2 and q.dim() == 3:
        slopes = slopes[first : first + documents]
    return attention_problem(
        _rows(q, piece, piece.rows),
        _rows(k, piece, piece.keys),
        _rows(v, piece, piece.keys),
        scale=call.scale,
        window=(call.mask.left, call.mask.right) if piece.masked else None,
        softcap=call.softcap,
        alibi_slopes=slopes,
        bias=None if call.bias is None else _bias(call.bias.detach(), piece),
        dropout_p=call.dropout_p,
        dropout_seed=call.seed,
        cu_seqlens_q=ends[0],
        cu_seqlens_k=ends[1],
        positions=replace(piece.positions, head_start=call.head_start),
    )


def _rows(x: Tensor, piece: Piece, span: slice) -> Tensor:
    """A view of the span of x [B, T, N, H]; of x [T, N, H] with a batch of one, unless the piece has documents."""
    if x.dim() == 4:
        return x[:, span]
    return x[span] if piece.cu_seqlens_q is not None else x[span].unsqueeze(0)


def _lse_rows(lse: Tensor, piece: Piece) -> Tensor:
    """A view of the piece's rows of lse [B, N, T], or of [N, T] as `_rows` gives them."""
    part = lse[..., piece.rows]
    return part.unsqueeze(0) if lse.dim() == 2 and piece.cu_seqlens_q is None else part


def _bias(bias: Tensor, piece: Piece) -> Tensor:
    """A view of the piece's part of bias [B|1, N|1, T|1, whole S|1]."""
    rows = piece.rows if bias.shape[2] > 1 else slice(None)
    at, count = piece.positions, piece.keys.stop - piece.keys.start
    keys = slice(at.k_start, at.k_start + at.step * (count - 1) + 1, at.step)
    return bias[:, :, rows, keys if bias.shape[3] > 1 else slice(None)]


@functools.lru_cache(maxsize=256)
def _on_device(ends: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=device)
