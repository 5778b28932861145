"""Cases of swiglu."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.swiglu import swiglu
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    rows, size = (8192, 11008) if large else (512, 2816)
    return [case((rows, size), quick=True), case((203, 1023)), case((301, size), halves=True)]


def case(shape: tuple[int, ...], halves: bool = False, quick: bool = False) -> Case:
    """gate and up of this shape; halves: of one tensor."""

    def inputs(draw: Draw) -> Inputs:
        # Three times as wide as a normal distribution, so that gates are also nearly closed and nearly open.
        gate, up = (draw.normal(*shape[:-1], 2 * shape[-1]) * 3).chunk(2, -1)
        return {"gate": gate, "up": up} if halves else {"gate": gate.contiguous(), "up": up.contiguous()}

    return Case(
        name="halves of one tensor" if halves else "two tensors",
        shape=f"gate {list(shape)}",
        inputs=inputs,
        gradients=("gate", "up"),
        ours=swiglu,
        plain=plain,
        peer=Peer("F.silu(gate) * up", plain),
        quick=quick,
    )


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
