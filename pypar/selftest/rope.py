"""Cases of rope."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.rope import rope
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    B, T, N, H = (4, 4096, 32, 128) if large else (1, 1024, 16, 64)
    return [
        _case(B, T, N, H, quick=True),
        _case(1, 203, 3, 46),
        _case(2, 113, 5, H, heads_first=True),
    ]


def _case(B: int, T: int, N: int, H: int, heads_first: bool = False, quick: bool = False) -> Case:
    def inputs(draw: Draw) -> Inputs:
        x = draw.normal(B, N, T, H).transpose(1, 2) if heads_first else draw.normal(B, T, N, H)
        angle = draw.uniform(T, H // 2) * 100
        return {"x": x, "cos": angle.cos(), "sin": angle.sin()}

    return Case(
        name="heads before positions" if heads_first else "contiguous",
        shape=f"B{B} T{T} N{N} H{H}",
        inputs=inputs,
        gradients=("x",),
        ours=rope,
        plain=_plain,
        peer=Peer("x * cos + rotate_half(x) * sin", _turn, _whole_tables),
        unread=("x",),
        quick=quick,
    )


def _whole_tables(inputs: Inputs) -> Inputs:
    """As Hugging Face's models keep them: for the whole head, in x's dtype."""
    x = inputs["x"]
    tables = {
        name: torch.cat((inputs[name], inputs[name]), -1).unsqueeze(1).to(x.dtype) for name in ("cos", "sin")
    }
    return {"x": x, **tables}


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(**_whole_tables({"x": x, "cos": cos, "sin": sin}))
