"""Cases of merge_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.merge_attention import merge_attention
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    positions, heads = (8192, 32) if large else (512, 16)
    return [
        case(2, (1, positions, heads, 128), quick=True),
        case(4, (2, positions // 4, heads, 64), hidden=True),
        case(3, (63, 5, 111), hidden=True),
    ]


def small_cases() -> list[Case]:
    """Sizes for interpreters of GPU kernels; every part is seen, so that every byte moves."""
    return [case(3, (2, 7, 3, 24), quick=True), case(2, (40, 2, 40)), case(1, (1, 3, 2, 63))]


def compiled_cases() -> list[Case]:
    """Heads of models, whose machine code is looked at; as few rows as will do."""
    return [case(2, (1, 2, 2, size)) for size in (128, 64, 576)]


def case(parts: int, shape: tuple[int, ...], *, hidden: bool = False, quick: bool = False) -> Case:
    """outs of [parts, *shape], shape (B,) T, N, H. hidden: rows that saw nothing in some parts, and some in none."""
    *batch, T, N, _ = shape

    def inputs(draw: Draw) -> Inputs:
        outs, lses = draw.normal(parts, *shape), draw.normal(parts, *batch, N, T, fp32=True) * 4
        if hidden:
            lses = torch.where(draw.uniform(*lses.shape) < 0.3, -torch.inf, lses)
            lses[..., T // 2] = -torch.inf
        return {"outs": outs, "lses": lses}

    return Case(
        name="some rows saw nothing" if hidden else "every row saw every part",
        shape=f"outs {[parts, *shape]}",
        inputs=inputs,
        gradients=("outs", "lses"),
        ours=merge_attention,
        plain=plain,
        peer=Peer("logsumexp, exp, sum", plain),
        quick=quick,
    )


def plain(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    nothing = (lses == -torch.inf).all(0)
    lse = torch.logsumexp(lses.masked_fill(nothing, 0.0), 0).masked_fill(nothing, -torch.inf)
    shares = (lses - lse.masked_fill(nothing, 0.0)).exp().mT.unsqueeze(-1)
    return (outs * shares).sum(0).to(outs.dtype), lse
