"""The definition of rope: pairs of a head's features turn by the angle of their position.

forward gives (q, k), turned; k is empty where there was none. backward takes the gradients of both in the place of q
and k and turns them back: a rotation's transpose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype

Turned = tuple[Tensor, Tensor]


class RopeInputs(NamedTuple):
    """What forward takes, and the operator pypar::rope_forward in this order; see `rope`."""

    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    interleaved: bool


def check(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: int | Tensor | None, in_place: bool
) -> None:
    """ValueError for operands that do not fit together."""
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if x.dim() != 4:
            raise ValueError(f"{name} {tuple(x.shape)} must be [B, T, N, H]; reshape it")
        if (x.shape[:2], x.shape[3], x.dtype) != (q.shape[:2], q.shape[3], q.dtype):
            raise ValueError(
                f"k {tuple(x.shape)} {x.dtype} must have q's B, T, H and dtype, and q is {tuple(q.shape)} {q.dtype}; "
                f"turn them by a call each"
            )
        if in_place and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"in_place=True would write into {name}, of which a gradient is wanted: what wrote it, or reads it "
                f"too, may need the old values for backward; leave in_place out, or use torch.no_grad()"
            )
        if in_place and any(
            size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)
        ):
            raise ValueError(
                f"in_place=True would turn elements of {name} several times, which share memory (strides "
                f"{x.stride()}); leave it out, or pass {name}.contiguous()"
            )
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, q, positions)
    if cos.shape != sin.shape:
        raise ValueError(f"sin {tuple(sin.shape)} must have the shape of cos {tuple(cos.shape)}")
    _check_positions(q, positions, len(cos))


def _check_table(name: str, table: Tensor, q: Tensor, positions: int | Tensor | None) -> None:
    B, T, _, H = q.shape
    if table.dtype not in (torch.float32, accumulate_dtype(q)):
        raise ValueError(
            f"{name} is {table.dtype} and must be float32, as angles need; convert with {name}.float()"
        )
    if table.dim() < 2 or 2 * table.shape[-1] > H:
        raise ValueError(
            f"{name} {tuple(table.shape)} must have a column for each pair of features, at most H/2 = {H // 2} of "
            f"q {tuple(q.shape)}; of a table that has the angles twice take the first half"
        )
    if positions is None:
        if table.shape[:-1] not in ((T,), (B, T), (1, T)):
            raise ValueError(
                f"{name} {tuple(table.shape)} must be [T, H/2] or [B, T, H/2] with B, T = {B}, {T}; take the rows of "
                f"q's positions, or say them with positions="
            )
    elif table.dim() != 2:
        raise ValueError(f"{name} {tuple(table.shape)} must be [positions, H/2] where positions= is given")


def _check_positions(q: Tensor, positions: int | Tensor | None, rows: int) -> None:
    B, T = q.shape[:2]
    if isinstance(positions, Tensor):
        if positions.shape not in ((T,), (B, T), (1, T)) or positions.dtype != torch.int64:
            raise ValueError(
                f"positions {tuple(positions.shape)} {positions.dtype} must be [T] or [B, T] = [{B}, {T}] and int64; "
                f"convert with positions.long()"
            )
    elif positions is not None and not 0 <= positions <= rows - T:
        raise ValueError(
            f"positions {positions} to {positions + T - 1} need as many rows of cos and sin, which have {rows}; make "
            f"longer tables"
        )


def check_rows(positions: Tensor, rows: int) -> None:
    """ValueError for positions on the CPU that are not rows of the tables; a GPU is not waited for."""
    if positions.device.type == "cpu" and positions.numel():
        least, most = (int(x) for x in torch.aminmax(positions))
        if least < 0 or most >= rows:
            raise ValueError(
                f"positions go from {least} to {most}, and cos and sin have {rows} rows; make longer tables"
            )


def reference_forward(given: RopeInputs) -> Turned:
    """(a, b) -> (a cos - b sin, b cos + a sin) for each pair; features beyond the tables' pairs stay as they are."""
    q, k, cos, sin, positions, interleaved = given
    if positions is not None:
        check_rows(positions, len(cos))
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.to(accumulate_dtype(q)).unsqueeze(-2), sin.to(accumulate_dtype(q)).unsqueeze(-2)
    k_out = q.new_empty(0) if k is None else _turned(k, cos, sin, interleaved)
    return _turned(q, cos, sin, interleaved), k_out


def reference_backward(given: RopeInputs) -> Turned:
    """The same by the opposite angle."""
    return reference_forward(given._replace(sin=-given.sin))


def reference_in_place(given: RopeInputs) -> None:
    """What forward gives, written over q and k."""
    q_out, k_out = reference_forward(given)
    given.q.copy_(q_out)
    if given.k is not None:
        given.k.copy_(k_out)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    pairs = x[..., :rotary].to(cos.dtype)
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    both = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((both.to(x.dtype), x[..., rotary:]), -1).contiguous()
