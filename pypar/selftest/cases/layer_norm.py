"""Cases of layer_norm."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.layer_norm import layer_norm
from pypar.selftest.case import Case, Draw, Inputs, Peer

EPS = 1e-5
VECTORS = ("weight", "bias")


def cases(large: bool) -> list[Case]:
    rows, size = (16384, 4096) if large else (1024, 2048)
    return [
        case((rows, size), quick=True),
        case((rows // 4, size), residual=True, quick=True),
        case((301, 1023), mean=30.0),
        case((rows // 8, 16, 128), vectors=("weight",)),
        case((7, 2 * size + 24), strided=True),
    ]


def small_cases() -> list[Case]:
    """Sizes and options for interpreters of GPU kernels."""
    return [
        case((5, 200), residual=True, quick=True),
        case((70, 64), vectors=("weight",)),
        case((3, 4, 40), residual=True, weight_offset=1.0, mean=30.0),
        case((3, 63), strided=True, vectors=("bias",)),
        case((2, 24), vectors=()),
    ]


def compiled_cases() -> list[Case]:
    """Rows of models, whose machine code is looked at; as few rows as will do."""
    return [case((2, size), residual=True) for size in (4096, 128, 1000, 8192)]


def case(
    shape: tuple[int, ...],
    *,
    residual: bool = False,
    vectors: tuple[str, ...] = VECTORS,
    weight_offset: float = 0.0,
    mean: float = 0.0,
    strided: bool = False,
    quick: bool = False,
) -> Case:
    """x of this shape, whose elements have this mean; strided: its rows are parts of longer ones."""

    def inputs(draw: Draw) -> Inputs:
        x = (draw.normal(*shape[:-1], shape[-1] + 5) + mean)[..., 2 : shape[-1] + 2]
        made = {"x": x if strided else x.contiguous()}
        if residual:
            made["residual"] = draw.normal(*shape)
        return made | {name: draw.normal(shape[-1]) for name in vectors}

    def ours(backend: str | None, **tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(eps=EPS, weight_offset=weight_offset, backend=backend, **tensors)  # type: ignore[call-overload]

    expected = partial(plain, weight_offset=weight_offset)
    words = (
        ["parts of longer rows"] * strided + ["residual"] * residual + ["1 + weight"] * bool(weight_offset)
    )
    words += [f"mean {mean:.0f}"] * bool(mean) + [f"no {name}" for name in VECTORS if name not in vectors]
    return Case(
        name=", ".join(words) or "contiguous",
        shape=f"x {list(shape)}",
        inputs=inputs,
        gradients=("x", *["residual"] * residual, *vectors),
        ours=ours,
        plain=expected,
        peer=Peer("F.layer_norm", expected),
        quick=quick,
    )


def plain(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    scale = weight + weight_offset if weight is not None and weight_offset else weight
    out = F.layer_norm(total, total.shape[-1:], scale, bias, EPS)
    return out if residual is None else (out, total)
