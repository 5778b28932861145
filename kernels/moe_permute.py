"""moe_permute and moe_combine in Triton.

Choices are sorted by counting: blocks count their experts side by side, one program adds the counts up in the order of
experts and, within one, of blocks, and each block then knows where its choices go. Rows are moved by token: a program
holds the numbers of its tokens' rows, and reads and writes each element once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches
from .rows import load_rows, store_rows

_CHOICES = 128  # of a program that sorts
_EXPERTS = 32  # that it looks at at a time
_STARTS = 1024  # numbers that the program that adds them up takes at a time
_ELEMENTS = 2048  # of a tile of tokens
_WARPS = 4


def order(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts [E], places [T, k], sources [T k]) of experts [T, k]; those out of range count as no expert's."""
    choices = experts.numel()
    counts, sources = experts.new_empty(num_experts), experts.new_empty(choices)
    places = torch.empty_like(experts)
    programs = triton.cdiv(choices, _CHOICES)
    starts = experts.new_empty(num_experts + 1, programs)
    sizes = {"CHOICES": choices, "PROGRAMS": programs, "E": num_experts}
    blocks = {"BLOCK": _CHOICES, "BLOCK_E": _EXPERTS}
    of_choices: dict[str, Any] = {"experts_ptr": experts, "starts_ptr": starts}
    of_starts = {"starts_ptr": starts, "counts_ptr": counts, "PROGRAMS": programs, "E": num_experts}
    results = {"places_ptr": places, "sources_ptr": sources}
    launches = [
        Launch(_count_kernel, programs, of_choices | sizes | blocks, _WARPS, 1),
        Launch(_starts_kernel, 1, of_starts | {"BLOCK": _STARTS}, _WARPS, 1),
        Launch(_places_kernel, programs, of_choices | results | sizes | blocks, _WARPS, 1),
    ]
    run_launches(launches, experts)
    return counts, places, sources


def scatter(x: Tensor, places: Tensor, weights: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """(each token of x [T, D] times its weights [T, k] at its rows of [T k, D], its products with `rows` [T, k]).

    Elements of a row are adjacent in x and rows.
    """
    (T, k), D = places.shape, x.shape[1]
    out = x.new_empty(T * k, D)
    products = x.new_empty((0,) if rows is None else (T, k), dtype=torch.float32)
    tile = _tile(D)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "places_ptr": places,
        "weights_ptr": weights,
        "rows_ptr": rows,
        "out_ptr": out,
        "products_ptr": None if rows is None else products,
        "T": T,
        "stride_x": x.stride(0),
        "stride_rows": 0 if rows is None else rows.stride(0),
        "K": k,
        "D": D,
        **tile,
    }
    run_launches([Launch(_scatter_kernel, triton.cdiv(T, tile["BLOCK_T"]), arguments, _WARPS, 1)], x)
    return out, products


def gather(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of each token's rows of [T k, D], elements adjacent, times their weights [T, k]: [T, D]."""
    (T, k), D = places.shape, rows.shape[1]
    out = rows.new_empty(T, D)
    tile = _tile(D)
    arguments: dict[str, Any] = {
        "rows_ptr": rows,
        "places_ptr": places,
        "weights_ptr": weights,
        "out_ptr": out,
        "T": T,
        "stride_rows": rows.stride(0),
        "K": k,
        "D": D,
        **tile,
    }
    run_launches([Launch(_gather_kernel, triton.cdiv(T, tile["BLOCK_T"]), arguments, _WARPS, 1)], rows)
    return out


def _tile(D: int) -> dict[str, int]:
    """Many short tokens, or one long one piece by piece."""
    block_d = min(triton.next_power_of_2(max(D, 1)), _ELEMENTS)
    return {"BLOCK_T": _ELEMENTS // block_d, "BLOCK_D": block_d}


@triton.jit
def _load_groups(experts_ptr, CHOICES, E, BLOCK: tl.constexpr):
    """(this program's choices, whether they are there, their experts; E for those without one)."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + choice, mask=choice < CHOICES, other=-1).to(tl.int32)
    return choice, choice < CHOICES, tl.where((expert < 0) | (expert >= E), E, expert)


@triton.jit(do_not_specialize=["CHOICES", "PROGRAMS", "E"])
def _count_kernel(experts_ptr, starts_ptr, CHOICES, PROGRAMS, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """starts [E + 1, programs] = how many of a program's choices are an expert's, the last: nobody's."""
    _, inside, group = _load_groups(experts_ptr, CHOICES, E, BLOCK)
    for first in range(0, E + 1, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        is_of = (group[:, None] == expert[None, :]) & inside[:, None]
        at = expert.to(tl.int64) * PROGRAMS + tl.program_id(0)
        tl.store(starts_ptr + at, tl.sum(is_of.to(tl.int32), 0).to(tl.int64), mask=expert <= E)


@triton.jit(do_not_specialize=["PROGRAMS", "E"])
def _starts_kernel(starts_ptr, counts_ptr, PROGRAMS, E, BLOCK: tl.constexpr):
    """Each count becomes the sum of those before it, which is the first row; counts [E] are the experts' sums."""
    before = tl.full([1], 0, tl.int64)
    for expert in range(0, E + 1):
        of_expert = tl.full([1], 0, tl.int64)
        for first in range(0, PROGRAMS, BLOCK):
            program = first + tl.arange(0, BLOCK)
            at = starts_ptr + tl.full([1], 1, tl.int64) * expert * PROGRAMS + program
            count = tl.load(at, mask=program < PROGRAMS, other=0)
            tl.store(at, before + of_expert + tl.cumsum(count, 0) - count, mask=program < PROGRAMS)
            of_expert += tl.sum(count, 0)
        tl.store(counts_ptr + expert + tl.arange(0, 1), of_expert, mask=expert + tl.arange(0, 1) < E)
        before += of_expert


@triton.jit(do_not_specialize=["CHOICES", "PROGRAMS", "E"])
def _places_kernel(
    experts_ptr, starts_ptr, places_ptr, sources_ptr, CHOICES, PROGRAMS, E,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A choice's row: where its expert's rows of this program start, and how many of them come before it."""
    choice, inside, group = _load_groups(experts_ptr, CHOICES, E, BLOCK)
    row = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, E + 1, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        is_of = (group[:, None] == expert[None, :]) & inside[:, None]
        at = expert.to(tl.int64) * PROGRAMS + tl.program_id(0)
        start = tl.load(starts_ptr + at, mask=expert <= E, other=0)
        before = tl.cumsum(is_of.to(tl.int32), 0) - 1
        row += tl.sum(tl.where(is_of, start[None, :] + before, 0), 1)
    tl.store(places_ptr + choice, tl.where(group < E, row, -1 - row), mask=inside)
    tl.store(sources_ptr + row, choice.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _scatter_kernel(
    x_ptr, places_ptr, weights_ptr, rows_ptr, out_ptr, products_ptr, T, stride_x, stride_rows,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    choice = token.to(tl.int64) * K
    for j in range(K):
        place = tl.load(places_ptr + choice + j, mask=token < T, other=0)
        row = tl.where(place < 0, -1 - place, place)
        weight = tl.full((BLOCK_T,), 1.0, tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + choice + j, mask=token < T, other=0.0)
        product = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            inside = (token < T)[:, None] & (column < D)[None, :]
            kept = inside & (place >= 0)[:, None]
            x = load_rows(x_ptr, token, stride_x, column, kept)
            if rows_ptr is not None:
                product += tl.sum(x * load_rows(rows_ptr, row, stride_rows, column, kept), 1)
            store_rows(out_ptr, row, D, column, inside, tl.where(kept, x * weight[:, None], 0.0))
        if rows_ptr is not None:
            tl.store(products_ptr + choice + j, product, mask=token < T)


@triton.jit(do_not_specialize=["T"])
def _gather_kernel(
    rows_ptr, places_ptr, weights_ptr, out_ptr, T, stride_rows,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    choice = token.to(tl.int64) * K
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (token < T)[:, None] & (column < D)[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for j in range(K):
            place = tl.load(places_ptr + choice + j, mask=token < T, other=-1)
            kept = inside & (place >= 0)[:, None]
            row = load_rows(rows_ptr, place, stride_rows, column, kept)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + choice + j, mask=token < T, other=0.0)
                row *= tl.where(place >= 0, weight, 0.0)[:, None]
            total += row
        store_rows(out_ptr, token, D, column, inside, total)
