"""Products of blocks, into memory that is there already."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.linear import chosen, linear_forward


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out [M, O] = a [M, K] @ b.T of b [O, K], or out += that, by the library that `pypar.ops.linear` takes.

    a and b may be transposes; out is contiguous.
    """
    if chosen(a, a.shape[1], b.shape[0]) == "torch":
        if add:
            out.addmm_(a, b.t())
        else:
            torch.mm(a, b.t(), out=out)
        return
    product = linear_forward(a, b)
    if add:
        out += product
    else:
        out.copy_(product)


_SLAB_BYTES = (
    16 << 20
)  # of a product in fp32 that is added to a sum: it stays in a GPU's cache of the second level


def multiply_kept_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """`multiply_into` of operands that keep their 16 bits: out is fp32, and sums are.

    A product of two such numbers has no more digits than fp32 holds, so this loses nothing against converting them
    first, and tensor cores make it, where torch can give fp32 results of 16 bits: on GPUs since 2.8. Elsewhere it
    multiplies copies in fp32.
    """
    if a.dtype == out.dtype:
        multiply_into(out, a, b, add=add)
        return
    if not add:
        _multiply_16_bits(out, a, b)
        return
    # Some versions of torch that take out_dtype in mm refuse it in addmm with a sum in fp32.
    rows = max(1, _SLAB_BYTES // (out.element_size() * max(1, out.shape[1])))
    product = out.new_empty(min(rows, len(out)), out.shape[1])
    for into, part in zip(out.split(rows), a.split(rows), strict=True):
        _multiply_16_bits(product[: len(part)], part, b)
        into += product[: len(part)]


def _multiply_16_bits(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.device.type == "cpu" or not hasattr(torch.ops.aten.mm, "dtype_out"):
        torch.mm(a.to(out.dtype), b.to(out.dtype).t(), out=out)
    else:
        torch.mm(a, b.t(), out_dtype=out.dtype, out=out)
