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
        case(count, torch.bfloat16, quick=True),
        case(count, torch.float32),
        case(1023, torch.float16),
    ]


def small_cases() -> list[Case]:
    """Sizes for interpreters of GPU kernels."""
    return [
        case(2500, torch.bfloat16, quick=True),
        case(63, torch.float32, scale=-0.25),
        case(1, torch.float16),
    ]


def compiled_cases() -> list[Case]:
    """Gradients on their way, whose machine code is looked at."""
    return [case(4096, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def case(count: int, dtype: torch.dtype, scale: float = _SCALE, quick: bool = False) -> Case:
    """`count` elements, scaled and converted to dtype."""

    def inputs(draw: Draw) -> Inputs:
        return {"src": draw.normal(count) * 100}

    def ours(src: Tensor, backend: str) -> Tensor:
        return bucket(src, scale, out=torch.empty_like(src, dtype=dtype), backend=backend)

    def torchs(src: Tensor) -> Tensor:
        return (src * scale).to(torch.float64 if src.dtype == torch.float64 else dtype)

    target = str(dtype).removeprefix("torch.")
    return Case(
        name=f"to {target}",
        shape=f"{count}",
        inputs=inputs,
        gradients=(),
        ours=ours,
        plain=torchs,
        peer=Peer(f"(src * scale).to({target})", torchs),
        quick=quick,
    )


def plain(src: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """In float64, where the product of two fp32 numbers is exact, then as fp32 has it, then once more rounded."""
    exact = src.double() * torch.tensor(scale, dtype=torch.float32).double()
    return exact.float().to(dtype)
