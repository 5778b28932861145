"""Cases of linear."""

from __future__ import annotations

from torch.nn import functional as F

from pypar.ops.linear import linear
from pypar.selftest.case import Case, Draw, Inputs, Peer

plain = F.linear


def cases(large: bool) -> list[Case]:
    size = 4096 if large else 512
    return [
        case((2 * size,), size, size, bias=False, quick=True),
        case((1023,), 111, 63),
        case((2100,), size, 200),
        case((256,), 8 * size, 64, bias=False),  # so long a chain that it shows
    ]


def case(
    rows: tuple[int, ...],
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    strided: bool = False,
    quick: bool = False,
) -> Case:
    """x [*rows, in_features]; strided: its rows are parts of longer ones, and weight is stored transposed."""

    def inputs(draw: Draw) -> Inputs:
        x = draw.normal(*rows, in_features + 3)[..., 1 : in_features + 1]
        weight = draw.normal(in_features, out_features).t()
        tensors = (
            {"x": x, "weight": weight} if strided else {"x": x.contiguous(), "weight": weight.contiguous()}
        )
        return tensors | ({"bias": draw.normal(out_features)} if bias else {})

    flops = 2.0 * in_features * out_features
    for count in rows:
        flops *= count
    return Case(
        name=("bias" if bias else "no bias") + (", strides" if strided else ""),
        shape=f"x {[*rows, in_features]} to {out_features}",
        inputs=inputs,
        gradients=("x", "weight", "bias") if bias else ("x", "weight"),
        ours=linear,
        plain=plain,
        peer=Peer("F.linear", plain),
        flops=(flops, 2 * flops),
        unread=("bias",) if bias else (),
        quick=quick,
    )
