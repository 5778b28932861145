"""Cases of swiglu."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.swiglu import swiglu
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    rows, size = (8192, 11008) if large else (512, 2816)
    return [_case(rows, size, quick=True), _case(203, 1023), _case(301, size, halves=True)]


def _case(rows: int, size: int, halves: bool = False, quick: bool = False) -> Case:
    def inputs(draw: Draw) -> Inputs:
        if halves:
            gate, up = draw.normal(rows, 2 * size).chunk(2, -1)
            return {"gate": gate, "up": up}
        return {"gate": draw.normal(rows, size), "up": draw.normal(rows, size)}

    return Case(
        name="halves of one tensor" if halves else "two tensors",
        shape=f"rows {rows} F{size}",
        inputs=inputs,
        gradients=("gate", "up"),
        ours=swiglu,
        plain=_plain,
        peer=Peer("F.silu(gate) * up", _plain),
        quick=quick,
    )


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
