"""Cases of moe_permute and moe_combine."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.moe_permute import moe_combine, moe_permute
from pypar.selftest.case import Case, Draw, Inputs, Peer


def cases(large: bool) -> list[Case]:
    tokens, size = (16384, 4096) if large else (1024, 1024)
    return [
        case(tokens, size, 64, 4, quick=True),
        combine_case(tokens, size, 64, 4, quick=True),
        case(63, 111, 5, 3, dropped=True, strided=True),
        combine_case(63, 111, 5, 3, dropped=True, strided=True),
        combine_case(tokens, 63, 7, 2, weighted=False),
    ]


def small_cases() -> list[Case]:
    """Sizes and options for interpreters of GPU kernels; all choices have an expert, so that every byte moves."""
    return [
        combine_case(50, 40, 3, 3, quick=True),
        case(70, 33, 40, 2),
        case(5, 200, 4, 1, strided=True),
        combine_case(9, 111, 2, 4, weighted=False, strided=True),
    ]


def kernel_cases() -> list[Case]:
    """The same with rows that are not read."""
    return [make(43, 40, 5, 3, dropped=True) for make in (case, combine_case)]


def compiled_cases() -> list[Case]:
    """Rows of models, whose machine code is looked at; as few as will do."""
    return [combine_case(2, size, 128, 8) for size in (4096, 128, 1000, 8192)]


def case(
    tokens: int,
    size: int,
    num_experts: int,
    k: int,
    *,
    dropped: bool = False,
    strided: bool = False,
    quick: bool = False,
) -> Case:
    """moe_permute of x [tokens, size].

    dropped: every fifth choice has no expert; strided: rows are parts of longer ones.
    """

    def inputs(draw: Draw) -> Inputs:
        return {
            "x": _matrix(draw, tokens, size, strided),
            "experts": _experts(draw, tokens, num_experts, k, dropped),
        }

    def ours(x: Tensor, experts: Tensor, backend: str | None) -> Tensor:
        return moe_permute(x, experts, num_experts, backend=backend).rows

    return Case(
        name=_name("permute", dropped, strided),
        shape=f"x {[tokens, size]}, {k} of {num_experts}",
        inputs=inputs,
        gradients=("x",),
        ours=ours,
        plain=plain,
        peer=Peer("argsort, index_select", plain),
        quick=quick,
    )


def combine_case(
    tokens: int,
    size: int,
    num_experts: int,
    k: int,
    *,
    weighted: bool = True,
    dropped: bool = False,
    strided: bool = False,
    quick: bool = False,
) -> Case:
    """moe_combine of rows [tokens * k, size], as `case` has it."""

    def inputs(draw: Draw) -> Inputs:
        made = {"rows": _matrix(draw, tokens * k, size, strided)}
        experts = _experts(draw, tokens, num_experts, k, dropped)
        made["places"] = moe_permute(
            torch.empty(tokens, 0, device=experts.device), experts, num_experts, backend="reference"
        ).places
        return made | ({"weights": draw.uniform(tokens, k)} if weighted else {})

    return Case(
        name=_name("combine" if weighted else "combine without weights", dropped, strided),
        shape=f"rows {[tokens * k, size]}, {k} of {num_experts}",
        inputs=inputs,
        gradients=("rows", *["weights"] * weighted),
        ours=moe_combine,
        plain=plain_combine,
        peer=Peer("index_add", added),
        quick=quick,
    )


def plain(x: Tensor, experts: Tensor) -> Tensor:
    flat, k = experts.flatten(), experts.shape[1]
    sources = torch.where(flat < 0, flat.max() + 1, flat).argsort(stable=True)
    rows = x.index_select(0, sources // k)
    return rows.masked_fill((flat[sources] < 0).unsqueeze(1), 0.0) if (flat < 0).any() else rows


def plain_combine(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """In the wider dtype, as a mixture of experts adds its experts up."""
    found = rows[torch.where(places < 0, ~places, places)]
    wide = found if weights is None else found * weights.unsqueeze(-1)
    return wide.masked_fill((places < 0).unsqueeze(-1), 0.0).sum(1).to(rows.dtype)


def added(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """With index_add, where every choice has an expert."""
    T, k = places.shape
    sources = torch.empty_like(places.flatten())
    sources[places.flatten()] = torch.arange(T * k, device=places.device)
    wide = rows if weights is None else rows * weights.flatten()[sources].to(rows.dtype).unsqueeze(1)
    return rows.new_zeros(T, rows.shape[1]).index_add(0, sources // k, wide)


def _matrix(draw: Draw, rows: int, size: int, strided: bool) -> Tensor:
    x = draw.normal(rows, size + 5)[:, 2 : size + 2]
    return x if strided else x.contiguous()


def _experts(draw: Draw, tokens: int, num_experts: int, k: int, dropped: bool) -> Tensor:
    """Each token's are different where there are enough, and the last expert has none."""
    scores = draw.uniform(tokens, max(num_experts - 1, k))
    experts = scores.argsort(dim=-1, stable=True)[:, :k] % num_experts
    if dropped:
        experts.flatten()[::5] = -1
    return experts.contiguous()


def _name(what: str, dropped: bool, strided: bool) -> str:
    words = [what] + ["every fifth without an expert"] * dropped + ["parts of longer rows"] * strided
    return ", ".join(words)
