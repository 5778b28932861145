"""Cases of rope."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.rope import rope
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    B, T, N, H = (4, 4096, 32, 128) if large else (1, 1024, 16, 64)
    return [
        case((B, T, N, H), quick=True),
        case((1, 203, 3, 46)),
        case((2, 113, 5, H), "heads before positions"),
    ]


def case(shape: tuple[int, int, int, int], memory: str = "contiguous", quick: bool = False) -> Case:
    """x [B, T, N, H]. memory: "contiguous", "heads before positions", "some heads" (of more) or "every second"."""
    B, T, N, H = shape

    def inputs(draw: Draw) -> Inputs:
        if memory == "heads before positions":
            x = draw.normal(B, N, T, H).transpose(1, 2)
        elif memory == "some heads":
            x = draw.normal(B, T, N + 3, H)[:, :, 1 : N + 1]
        elif memory == "every second":
            x = draw.normal(B, T, N, 2 * H)[..., ::2]
        else:
            x = draw.normal(B, T, N, H)
        angle = draw.uniform(T, H // 2) * 100
        return {"x": x, "cos": angle.cos(), "sin": angle.sin()}

    return Case(
        name=memory,
        shape=f"B{B} T{T} N{N} H{H}",
        inputs=inputs,
        gradients=("x",),
        ours=rope,
        plain=plain,
        peer=Peer("x * cos + rotate_half(x) * sin", _turn, _whole_tables),
        unread=("x",),
        quick=quick,
    )


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Hugging Face's Llama computes it: everything in x's dtype."""
    return _turn(**_whole_tables({"x": x, "cos": cos, "sin": sin}))


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
