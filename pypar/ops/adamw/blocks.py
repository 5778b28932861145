"""Moments in 8 bits: blocks of 256 elements, each with the largest of its absolute values (Dettmers, arXiv 2110.02861).

A code stands for one of 256 parts of that largest value, the dynamic tree of the paper: 1, 0, and the middles of equal
intervals of each of seven decades, twice as many in each as in the one below it. First moments are signed, with 1 to 64
intervals in a decade; second moments are not, with 2 to 128.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
DECADES = 7


class Blocks(NamedTuple):
    """A moment in 8 bits: codes (uint8, of the parameter's shape) and absmax (fp32 [ceil(elements / 256)]).

    A block is 256 elements that lie side by side in memory.
    """

    codes: Tensor
    absmax: Tensor


def zero_blocks(like: Tensor, *, signed: bool) -> Blocks:
    """Zeros for a parameter."""
    codes = torch.full_like(like, 127 if signed else 0, dtype=torch.uint8, requires_grad=False)
    return Blocks(codes, like.new_zeros(-(-like.numel() // BLOCK), dtype=torch.float32))


@functools.cache
def values(signed: bool) -> Tensor:
    """What each of the 256 codes stands for, fp32, ascending."""
    first = 0 if signed else 1  # the lowest decade has 2**first intervals
    positive = [
        10.0 ** (decade + 1 - DECADES) * (0.1 + 0.9 * (interval + 0.5) / 2 ** (decade + first))
        for decade in range(DECADES)
        for interval in range(2 ** (decade + first))
    ]
    negative = [-value for value in reversed(positive)] if signed else []
    return torch.tensor([*negative, 0.0, *positive, 1.0])


@functools.cache
def lines(signed: bool) -> Tensor:
    """[2, 7] slopes and offsets: the whole part of the lowest line at |x| / absmax counts the intervals up to it.

    With n intervals, decade d's line is 10**(6-d) n / 0.9 x + 8/9 n: n at its lower end and 2 n at its upper. The
    slopes fall from decade to decade, so that the lowest line is that of the decade in which x is.
    """
    first = 0 if signed else 1
    sizes = [2 ** (decade + first) for decade in range(DECADES)]
    slopes = [10.0 ** (DECADES - 1 - decade) * size / 0.9 for decade, size in enumerate(sizes)]
    return torch.tensor([slopes, [8 / 9 * size for size in sizes]])


@functools.cache
def tables(device: torch.device | None = None) -> Tensor:
    """fp32 [540]: values, then lines, of signed and unsigned codes, as kernels read them."""
    found = torch.cat([values(True), values(False), lines(True).flatten(), lines(False).flatten()])
    return found.to(device)


def to_blocks(x: Tensor, *, signed: bool) -> Blocks:
    """fp32 x, without gaps in memory, in 8 bits."""
    codes, absmax = encode(x.as_strided((x.numel(),), (1,)), signed=signed)
    return Blocks(codes.as_strided(x.shape, x.stride()), absmax)


def from_blocks(blocks: Blocks, *, signed: bool) -> Tensor:
    """The fp32 tensor that blocks stand for."""
    codes = blocks.codes
    parts = decode(codes.as_strided((codes.numel(),), (1,)), blocks.absmax, signed=signed)
    return parts.as_strided(codes.shape, codes.stride())


def decode(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """fp32 numbers of codes [n]."""
    parts = values(signed).to(codes.device)[codes.long()]
    return parts * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def encode(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes [n], absmax [ceil(n / 256)]) of fp32 x [n].

    A number becomes the middle of the interval that it is in. A second moment that is not 0 never becomes 0, as the
    next update divides by its root. A block with a number that is missing or infinite has such an absmax, and decodes
    to missing numbers.
    """
    absmax = F.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK).abs().amax(1) if x.numel() else x
    divisor = absmax.where(absmax != 0, 1).repeat_interleave(BLOCK)[: x.numel()]
    part = x.abs() / divisor
    part = part.where(part <= 1, 0)
    slopes, offsets = lines(signed).to(x.device)
    level = part * slopes[0] + offsets[0]
    for slope, offset in zip(slopes[1:], offsets[1:], strict=True):
        level = torch.minimum(level, part * slope + offset)
    count = level.int()  # of the intervals up to x
    if signed:
        codes = torch.where(x < 0, 127 - count.clamp(max=127), 127 + count)
    else:
        codes = torch.where((x > 0) & (count < 2), 1, count - 1)
    return codes.to(torch.uint8), absmax
