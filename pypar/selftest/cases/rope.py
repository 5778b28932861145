"""Cases of rope."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pypar.ops.rope import rope
from pypar.selftest.case import Case, Draw, Inputs, Peer

MEMORY = ("contiguous", "heads before positions", "some heads", "every second")


def cases(large: bool) -> list[Case]:
    B, T, N, H = (4, 4096, 32, 128) if large else (1, 1024, 16, 64)
    return [
        case((B, T, N, H), kv_heads=N // 4, quick=True),
        case((1, 203, 3, 46)),
        case((2, 113, 5, H), "heads before positions", kv_heads=2, positions="B, T"),
        case((B, T, N, H), kv_heads=N // 4, interleaved=True),
        case((2, 113, 5, H), rotary=H // 4, positions="B, T"),
    ]


def small_cases() -> list[Case]:
    """Sizes and options for interpreters of GPU kernels."""
    return [
        case((2, 7, 6, 32), kv_heads=2, quick=True),
        case((1, 9, 3, 46), "some heads", kv_heads=1, positions="B, T"),
        case((2, 5, 4, 16), "heads before positions", kv_heads=4, interleaved=True),
        case((1, 11, 5, 40), rotary=12, positions="T"),
        case((2, 3, 3, 24), rotary=8, kv_heads=3, interleaved=True, positions="tables of each"),
    ]


def compiled_cases() -> list[Case]:
    """Heads of models, whose machine code is looked at; as few as will do."""
    return [
        case((1, 2, 32, 128), kv_heads=8),
        case((1, 2, 32, 128), kv_heads=8, interleaved=True),
        case((1, 2, 16, 96), rotary=24, positions="B, T"),
        case((2, 1, 8, 256), "heads before positions", kv_heads=1),
    ]


def case(
    shape: tuple[int, int, int, int],
    memory: str = "contiguous",
    *,
    kv_heads: int | None = None,
    rotary: int | None = None,
    interleaved: bool = False,
    positions: str = "",
    quick: bool = False,
) -> Case:
    """q [B, T, N, H], and k [B, T, kv_heads, H] where it is given.

    memory: one of MEMORY. rotary: how many features turn; all if left out. positions: "" for tables of these positions,
    "tables of each" for those of each sequence; "T" or "B, T" for rows of longer tables.
    """
    B, T, N, H = shape
    pairs = (H if rotary is None else rotary) // 2
    heads = {"q": N} | ({} if kv_heads is None else {"k": kv_heads})

    def inputs(draw: Draw) -> Inputs:
        made = {name: _drawn(draw, (B, T, count, H), memory) for name, count in heads.items()}
        rows = {"": (T,), "tables of each": (B, T)}.get(positions, (2 * T + 3,))
        angle = draw.uniform(*rows, pairs) * 100
        made |= {"cos": angle.cos(), "sin": angle.sin()}
        if positions in ("T", "B, T"):
            made["positions"] = draw.whole(2 * T + 3, *((B, T) if positions == "B, T" else (T,)))
        return made

    def ours(backend: str | None, **tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return rope(interleaved=interleaved, backend=backend, **tensors)  # type: ignore[call-overload]

    words = [memory] + ["interleaved"] * interleaved + [f"{rotary} features"] * (rotary is not None)
    return Case(
        name=", ".join(words + [f"positions [{positions}]"] * bool(positions)),
        shape=f"B{B} T{T} N{N} H{H}" + (f" G{kv_heads}" if kv_heads is not None else ""),
        inputs=inputs,
        gradients=tuple(heads),
        ours=ours,
        plain=partial(plain, interleaved=interleaved),
        peer=Peer(
            "x * cos + rotate_half(x) * sin",
            partial(_turn_all, interleaved=interleaved),
            _prepared(interleaved),
        ),
        unread=tuple(heads),
        quick=quick,
    )


def _drawn(draw: Draw, shape: tuple[int, int, int, int], memory: str) -> Tensor:
    B, T, N, H = shape
    if memory == "heads before positions":
        return draw.normal(B, N, T, H).transpose(1, 2)
    if memory == "some heads":
        return draw.normal(B, T, N + 3, H)[:, :, 1 : N + 1]
    if memory == "every second":
        return draw.normal(B, T, N, 2 * H)[..., ::2]
    return draw.normal(B, T, N, H)


def plain(interleaved: bool = False, **inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """As Hugging Face's models compute it: everything in q's dtype."""
    return _turn_all(**_whole_tables(inputs, interleaved), interleaved=interleaved)


def _prepared(interleaved: bool) -> partial[Inputs]:
    return partial(_whole_tables, interleaved=interleaved)


def _whole_tables(inputs: Inputs, interleaved: bool) -> Inputs:
    """As Hugging Face's models keep them: for all features that turn, by position, in q's dtype."""
    kept: Inputs = {name: inputs[name] for name in ("q", "k") if name in inputs}
    for name in ("cos", "sin"):
        rows = inputs[name][inputs["positions"]] if "positions" in inputs else inputs[name]
        whole = rows.repeat_interleave(2, -1) if interleaved else torch.cat((rows, rows), -1)
        kept[name] = whole.unsqueeze(-2).to(inputs["q"].dtype)
    return kept


def _turn_all(
    q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None = None, interleaved: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    turned = [_turn(x, cos, sin, interleaved) for x in (q, k) if x is not None]
    return turned[0] if k is None else (turned[0], turned[1])


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary, whole = cos.shape[-1], x
    x = x if rotary == x.shape[-1] else x[..., :rotary]
    if interleaved:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    out = x * cos + other * sin
    return out if rotary == whole.shape[-1] else torch.cat((out, whole[..., rotary:]), -1)
