"""Products of blocks, into memory that is there already."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.backend import choose
from pypar.ops.linear import BACKENDS, linear_forward


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out [M, O] = a [M, K] @ b.T of b [O, K], or out += that, by the library that `pypar.ops.linear` takes.

    a and b may be transposes; out is contiguous.
    """
    args = {"x": a, "in_features": a.shape[1], "out_features": b.shape[0]}
    if choose("linear", BACKENDS, args, None).name == "torch":
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
