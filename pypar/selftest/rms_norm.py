"""Cases of rms_norm."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.rms_norm import rms_norm
from pypar.selftest.case import Case, Draw, Inputs, Peer

_EPS = 1e-5


def cases(large: bool) -> list[Case]:
    rows, size = (16384, 4096) if large else (1024, 2048)
    return [_case(rows, size, quick=True), _case(301, 1023), _case(7, 2 * size + 24)]


def _case(rows: int, size: int, quick: bool = False) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, size), "weight": draw.normal(size)}

    return Case(
        name="weight",
        shape=f"rows {rows} D{size}",
        inputs=inputs,
        gradients=("x", "weight"),
        ours=lambda x, weight, backend: rms_norm(x, weight, _EPS, backend=backend),
        plain=_plain,
        peer=Peer("F.rms_norm", _plain),
        quick=quick,
    )


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)
