"""Cases of rms_norm."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.rms_norm import rms_norm
from pypar.selftest.case import Case, Draw, Inputs, Peer

EPS = 1e-5


def cases(large: bool) -> list[Case]:
    rows, size = (16384, 4096) if large else (1024, 2048)
    return [case((rows, size), quick=True), case((301, 1023)), case((7, 2 * size + 24), strided=True)]


def case(shape: tuple[int, ...], strided: bool = False, quick: bool = False) -> Case:
    """x of this shape; strided: its rows are parts of longer ones."""

    def inputs(draw: Draw) -> Inputs:
        x = draw.normal(*shape[:-1], shape[-1] + 5)[..., 2 : shape[-1] + 2]
        return {"x": x if strided else x.contiguous(), "weight": draw.normal(shape[-1])}

    return Case(
        name="parts of longer rows" if strided else "contiguous",
        shape=f"x {list(shape)}",
        inputs=inputs,
        gradients=("x", "weight"),
        ours=lambda x, weight, backend: rms_norm(x, weight, EPS, backend=backend),
        plain=plain,
        peer=Peer("F.rms_norm", plain),
        quick=quick,
    )


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)
