"""Cases of bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.bucket import bucket
from pypar.selftest.case import Case, Draw, Inputs, Peer

_SCALE = 1 / 3


def cases(large: bool) -> list[Case]:
    count = 1 << 26 if large else 1 << 22
    return [
        _case("to bf16", torch.bfloat16, count, quick=True),
        _case("to fp32", torch.float32, count),
        _case("to fp16", torch.float16, 1023),
    ]


def _case(name: str, dtype: torch.dtype, count: int, quick: bool = False) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return {"src": draw.normal(count)}

    def ours(src: Tensor, backend: str) -> Tensor:
        return bucket(src, _SCALE, out=torch.empty_like(src, dtype=dtype), backend=backend)

    def plain(src: Tensor) -> Tensor:
        return (src * _SCALE).to(torch.float64 if src.dtype == torch.float64 else dtype)

    return Case(
        name=name,
        shape=f"{count}",
        inputs=inputs,
        gradients=(),
        ours=ours,
        plain=plain,
        peer=Peer(f"(src / 3).{name.replace(' ', '(')})", plain),
        quick=quick,
    )
