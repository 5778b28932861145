"""adamw in Triton: one launch for hundreds of tensors, which a program finds in a table.

Each product is rounded before it is added, roots and quotients are those of IEEE 754, and random numbers are those of
the definition, so that a GPU gives the bits that a CPU gives.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Table, run_launches

_TENSORS = 512  # of a launch; a program looks at as many numbers to find its own
_CHUNK = 16384  # elements of a program
_TILE_ROWS = 4  # blocks of 256 that it holds at a time: 8 elements for each of 128 threads
_BLOCK = tl.constexpr(256)  # of moments in 8 bits
_VALUES, _LINES = tl.constexpr(256), tl.constexpr(7)  # of a code, and to find it
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


class Numbers(NamedTuple):
    """What all elements share."""

    factor: float  # of the gradients
    decay: float
    rest1: float  # 1 - beta1
    beta1: float
    beta2: float
    rest2: float
    step_size: float
    root_factor: float
    eps: float
    key: int  # 64 bits, as a signed number


def update(
    lists: tuple[list[Tensor], ...],
    places: list[int],
    numbers: Numbers,
    tables: Tensor | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    stochastic: bool,
) -> None:
    """One update of tensors of one device.

    lists: params, gradients, masters, exp_avgs, exp_avg_sqs, absmaxes of both; those that are not there are empty.
    places: three numbers a tensor, as pypar.ops.adamw.Place; tables: of moments in 8 bits, fp32, as
    pypar.ops.adamw.blocks.tables; scale, found_inf: fp32, one number; all on that device.
    """
    params, gradients, masters, exp_avgs, exp_avg_sqs, absmaxes, _ = lists
    shared: dict[str, Any] = {"tables_ptr": tables, "scale_ptr": scale, "found_inf_ptr": found_inf}
    shared |= numbers._asdict() | {"HAS_MASTERS": bool(masters), "IN_BLOCKS": bool(absmaxes)}
    shared |= {"PARAM": _TYPES[params[0].dtype], "GRADIENT": _TYPES[gradients[0].dtype]}
    shared |= {"MOMENT": _TYPES[exp_avgs[0].dtype], "NEAR_ZERO": numbers.rest1 < 0.5}
    shared |= {
        "ROUND_PARAM": stochastic and not masters and params[0].dtype == torch.bfloat16,
        "ROUND_SECOND": stochastic and exp_avg_sqs[0].dtype == torch.bfloat16,
    }
    shared |= {"CHUNK": _CHUNK, "TILE_ROWS": _TILE_ROWS, "BLOCK_N": _TENSORS}
    launches = []
    for is_aligned in (True, False):
        kind = [i for i in range(len(params)) if params[i].numel() and _is_aligned(lists, i) == is_aligned]
        for begin in range(0, len(kind), _TENSORS):
            some = kind[begin : begin + _TENSORS]
            table, chunks = _table(lists, places, some)
            own = {"table_ptr": table, "n": len(some), "ALIGNED": is_aligned}
            launches.append(Launch(_adamw_kernel, chunks, shared | own, 4, 1, is_contracted=False))
    run_launches(launches, params[0])


def _is_aligned(lists: tuple[list[Tensor], ...], index: int) -> bool:
    """Whether every load and store of the tensor's elements may be one of 16 bytes."""
    of_elements = [column[index] for column in lists[:5] if column]
    return of_elements[0].numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in of_elements)


def _table(lists: tuple[list[Tensor], ...], places: list[int], some: list[int]) -> tuple[Table, int]:
    """The table of the tensors of these numbers, and how many chunks they have."""
    counts = [lists[0][i].numel() for i in some]
    first_chunks, chunks = [], 0
    for count in counts:
        first_chunks.append(chunks)
        chunks += triton.cdiv(count, _CHUNK)
    columns = [[places[3 * i + part] for i in some] for part in range(3)]
    tensors = tuple([column[i] for i in some] if column else [] for column in lists)
    return Table(tensors, (counts, *columns, first_chunks)), chunks


@triton.jit(do_not_specialize=["n", "key"])
def _adamw_kernel(
    table_ptr, tables_ptr, scale_ptr, found_inf_ptr, n,
    factor, decay, rest1, beta1, beta2, rest2, step_size, root_factor, eps, key,
    HAS_MASTERS: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    PARAM: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    NEAR_ZERO: tl.constexpr,
    ROUND_PARAM: tl.constexpr,
    ROUND_SECOND: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK_N)
    first_chunks = tl.load(table_ptr + 11 * n + index, mask=index < n, other=1 << 40)
    mine = tl.sum((first_chunks <= tl.program_id(0)).to(tl.int32), 0) - 1
    entry = table_ptr + mine
    begin = (tl.program_id(0) - tl.load(entry + 11 * n)) * CHUNK
    count = tl.load(entry + 7 * n)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    end = tl.minimum(begin + CHUNK, count)
    if found_inf_ptr is not None:
        end = tl.where(tl.load(found_inf_ptr) == 0, end, begin)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    param_ptr = _tensor(table_ptr, entry, PARAM, ALIGNED)
    gradient_ptr = _tensor(table_ptr, entry + n, GRADIENT, ALIGNED)
    if HAS_MASTERS:
        master_ptr = _tensor(table_ptr, entry + 2 * n, tl.float32, ALIGNED)
    else:
        master_ptr = param_ptr
    m_ptr = _tensor(table_ptr, entry + 3 * n, MOMENT, ALIGNED)
    v_ptr = _tensor(table_ptr, entry + 4 * n, MOMENT, ALIGNED)
    for first in range(begin, end, TILE_ROWS * _BLOCK):
        row = first + tl.arange(0, TILE_ROWS)[:, None] * _BLOCK
        at = row + tl.arange(0, _BLOCK)[None, :]
        inside = at < count
        g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
        p = tl.load(master_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=inside, other=0)
        v = tl.load(v_ptr + at, mask=inside, other=0)
        if IN_BLOCKS:
            m_absmax_ptr = _tensor(table_ptr, entry + 5 * n, tl.float32, False) + row // _BLOCK
            v_absmax_ptr = _tensor(table_ptr, entry + 6 * n, tl.float32, False) + row // _BLOCK
            m = tl.load(tables_ptr + m) * tl.load(m_absmax_ptr, mask=row < count, other=0.0)
            v = tl.load(tables_ptr + _VALUES + v) * tl.load(v_absmax_ptr, mask=row < count, other=0.0)
        m, v = m.to(tl.float32), v.to(tl.float32)
        m = m + (g - m) * rest1 if NEAR_ZERO else g - (g - m) * beta1
        v = v * beta2 + g * rest2 * g
        root = tl.sqrt_rn(v) * root_factor + eps
        p = p * decay - tl.div_rn(m * step_size, root)
        if ROUND_PARAM or ROUND_SECOND:
            word = _random(entry, n, at, key)
            if ROUND_SECOND:
                v = _rounded(v, word >> 16)
            if ROUND_PARAM:
                p = _rounded(p, word & 0xFFFF)
        if IN_BLOCKS:
            m, m_absmax = _encoded(m, tables_ptr + 2 * _VALUES, True)
            v, v_absmax = _encoded(v, tables_ptr + 2 * _VALUES + 2 * _LINES, False)
            tl.store(m_absmax_ptr, m_absmax, mask=row < count)
            tl.store(v_absmax_ptr, v_absmax, mask=row < count)
        tl.store(m_ptr + at, m.to(MOMENT), mask=inside)
        tl.store(v_ptr + at, v.to(MOMENT), mask=inside)
        tl.store(param_ptr + at, p.to(PARAM), mask=inside)
        if HAS_MASTERS:
            tl.store(master_ptr + at, p, mask=inside)


@triton.jit
def _tensor(table_ptr, offset_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor begins, of which the table says how many bytes behind itself that is."""
    offset = tl.load(offset_ptr)
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return (table_ptr.to(tl.pointer_type(tl.uint8)) + offset).to(tl.pointer_type(TYPE))


@triton.jit
def _random(entry, n, at, key):
    """32 random bits for each of the elements `at` of a tensor: random_words of pypar.ops.adamw.rounding."""
    first, run, stride = tl.load(entry + 8 * n), tl.load(entry + 9 * n), tl.load(entry + 10 * n)
    number = (first + at // run * stride + at % run).to(tl.uint64)
    here = _mixed(key.to(tl.int64).to(tl.uint64) + (number >> 32))
    x = number.to(tl.uint32) ^ here.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD + (here >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _mixed(x):
    """splitmix64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _rounded(x, random):
    """x in fp32 that bf16 can hold, up where the bits that bf16 has no room for exceed random's 16."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _encoded(x, lines_ptr, SIGNED: tl.constexpr):
    """(codes, absmax) of blocks, which are rows: encode of pypar.ops.adamw.blocks."""
    size = tl.abs(x)
    absmax = tl.max(size, 1, keep_dims=True)
    missing = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
    absmax = tl.where(missing > 0, float("nan"), absmax)
    part = tl.div_rn(size, tl.broadcast_to(tl.where(absmax != 0, absmax, 1.0), size.shape))
    part = tl.where(part <= 1.0, part, 0.0)
    level = part * tl.load(lines_ptr) + tl.load(lines_ptr + _LINES)
    for line in tl.static_range(1, _LINES):
        level = tl.minimum(level, part * tl.load(lines_ptr + line) + tl.load(lines_ptr + _LINES + line))
    count = level.to(tl.int32)  # of the intervals up to x
    if SIGNED:
        code = tl.where(x < 0, 127 - tl.minimum(count, 127), 127 + count)
    else:
        code = tl.where((x > 0) & (count < 2), 1, count - 1)
    return code, absmax
