"""Cases of swiglu, geglu and clamped_swiglu."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.gated import clamped_swiglu, geglu, swiglu
from pypar.selftest.case import Case, Draw, Function, Inputs, Peer

ALPHA, LIMIT = 1.702, 2.5  # within what is drawn; GPT-OSS has 7

MEMORY = ("two tensors", "views of halves", "halves", "interleaved")

OURS: dict[str, Function] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu tanh": partial(geglu, approximate="tanh"),
    "clamped_swiglu": partial(clamped_swiglu, alpha=ALPHA, limit=LIMIT),
}


def cases(large: bool) -> list[Case]:
    rows, size = (8192, 11008) if large else (512, 2816)
    return [
        case((rows, size), quick=True),
        case((203, 1023)),
        case((301, size), memory="halves"),
        case((rows, size), "geglu"),
        case((rows, size), "geglu tanh"),
        case((rows, size), "clamped_swiglu", "interleaved"),
    ]


def small_cases() -> list[Case]:
    """Sizes and options for interpreters of GPU kernels."""
    return [
        case((5, 200), quick=True),
        case((3, 1023), "clamped_swiglu", "interleaved"),
        case((2, 3, 46), "geglu", "halves"),
        case((3, 63), "geglu tanh", "views of halves"),
        case((70, 24), "swiglu", "interleaved"),
    ]


def compiled_cases() -> list[Case]:
    """Rows of models, whose machine code is looked at; as few rows as will do."""
    return [
        case((2, 11008), "clamped_swiglu", "interleaved"),
        case((2, 11008)),
        case((2, 2880), "geglu", "halves"),
        case((2, 128), "geglu tanh"),
    ]


def case(
    shape: tuple[int, ...], name: str = "swiglu", memory: str = "two tensors", quick: bool = False
) -> Case:
    """gate and up of this shape. name: one of OURS. memory: one of MEMORY; the last two are one tensor."""
    together = memory in ("halves", "interleaved")

    def inputs(draw: Draw) -> Inputs:
        # Three times as wide as a normal distribution, so that gates are also nearly closed and nearly open.
        both = draw.normal(*shape[:-1], 2 * shape[-1]) * 3
        if together:
            return {"gate": both}
        gate, up = both.chunk(2, -1)
        apart = memory == "two tensors"
        return {"gate": gate.contiguous() if apart else gate, "up": up.contiguous() if apart else up}

    expected = partial(plain, name=name, interleaved=memory == "interleaved")
    function = OURS[name]
    return Case(
        name=f"{name}, {memory}",
        shape=f"gate {list(shape)}",
        inputs=inputs,
        gradients=("gate",) if together else ("gate", "up"),
        ours=partial(function, interleaved=True) if memory == "interleaved" else function,
        plain=expected,
        peer=Peer("torch's activation(gate) * up", expected),
        quick=quick,
    )


def plain(gate: Tensor, up: Tensor | None = None, name: str = "swiglu", interleaved: bool = False) -> Tensor:
    """As models of Hugging Face compute it."""
    if up is None:
        gate, up = (gate[..., ::2], gate[..., 1::2]) if interleaved else gate.chunk(2, -1)
    if name == "swiglu":
        return F.silu(gate) * up
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=LIMIT), up.clamp(min=-LIMIT, max=LIMIT)
        return (up + 1) * (gate * (gate * ALPHA).sigmoid())
    return F.gelu(gate, approximate="none" if name == "geglu" else "tanh") * up
