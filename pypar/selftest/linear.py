"""Cases of linear."""

from __future__ import annotations

from torch.nn import functional as F

from pypar.ops.linear import linear
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    size = 4096 if large else 512
    return [
        _case(2 * size, size, size, bias=False, quick=True),
        _case(1023, 111, 63, bias=True),
        _case(2100, size, 200, bias=True),
        _case(256, 8 * size, 64, bias=False),  # so long a chain that it shows
    ]


def _case(rows: int, K: int, out_features: int, bias: bool, quick: bool = False) -> Case:
    def inputs(draw: Draw) -> Inputs:
        tensors = {"x": draw.normal(rows, K), "weight": draw.normal(out_features, K)}
        return tensors | ({"bias": draw.normal(out_features)} if bias else {})

    flops = 2.0 * rows * K * out_features
    return Case(
        name="bias" if bias else "no bias",
        shape=f"rows {rows} K{K} O{out_features}",
        inputs=inputs,
        gradients=("x", "weight", "bias") if bias else ("x", "weight"),
        ours=linear,
        plain=F.linear,
        peer=Peer("F.linear", F.linear),
        flops=(flops, 2 * flops),
        unread=("bias",) if bias else (),
        quick=quick,
    )
