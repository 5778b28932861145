"""rope in Triton: one launch turns the heads of q and of k. A program holds some heads of some positions."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches

LARGEST_HEAD = 2048  # features
_PAIRS = 1024  # of a program: 8 for each of 128 threads, loads of 16 bytes of bfloat16


def turn(given: Any, q_out: Tensor, k_out: Tensor | None, direction: float) -> None:
    """q_out = q turned by direction (1 or -1) times the angles, k_out = k turned; each may be its own input.

    given: RopeInputs of pypar.ops.rope (read here, not imported). q [B, T, N, H], k [B, T, G, H], the features of a
    head adjacent; cos, sin: contiguous, [rows, R/2] or [B, T, R/2], fp32; positions: int64 [B, T], rows of cos and sin,
    any strides.
    """
    q, k, cos, sin, positions, interleaved = given
    B, T, _, H = q.shape
    pairs = cos.shape[-1]
    rest = triton.next_power_of_2(H - 2 * pairs) if 2 * pairs < H and q_out is not q else 0
    arguments: dict[str, Any] = {
        "cos_ptr": cos,
        "sin_ptr": sin,
        "positions_ptr": positions,
        "rows": cos.numel() // pairs if pairs else 0,
        "stride_table": 0 if cos.dim() == 2 else T,
        "stride_positions_b": 0 if positions is None else positions.stride(0),
        "stride_positions_t": 0 if positions is None else positions.stride(1),
        "B": B,
        "T": T,
        "direction": direction,
    }
    block_c = triton.next_power_of_2(max(pairs, 1))
    programs = {}
    for name, x, out in (("q", q, q_out), ("k", k, k_out)):
        heads = 0 if x is None else x.shape[2]
        block_n = min(triton.next_power_of_2(max(heads, 1)), max(1, _PAIRS // max(block_c, rest // 2)))
        block_t = max(1, _PAIRS // (max(block_c, rest // 2) * block_n))
        programs[name] = triton.cdiv(B * T, block_t) * triton.cdiv(heads, block_n)
        strides = (0,) * 3 if x is None else x.stride()[:3]
        out_strides = (0,) * 3 if x is None or out is None else out.stride()[:3]
        arguments |= {f"{name}_ptr": x, f"{name}_out_ptr": None if x is None else out}
        arguments |= dict(zip((f"stride_{name}{dim}" for dim in "btn"), strides, strict=True))
        arguments |= dict(zip((f"stride_{name}_out_{dim}" for dim in "btn"), out_strides, strict=True))
        arguments |= {f"HEADS_{name.upper()}": heads, f"BLOCK_T_{name.upper()}": block_t}
        arguments |= {f"BLOCK_N_{name.upper()}": block_n}
    arguments |= {"programs_q": programs["q"], "H": H, "PAIRS": pairs, "BLOCK_C": block_c, "BLOCK_REST": rest}
    arguments |= {"INTERLEAVED": interleaved}
    run_launches([Launch(_rope_kernel, sum(programs.values()), arguments, 4, 1)], q)


@triton.jit(do_not_specialize=["B", "T", "rows", "stride_table", "programs_q", "direction"])
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows,
    stride_table,
    stride_positions_b,
    stride_positions_t,
    B,
    T,
    direction,
    programs_q,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_q_out_b,
    stride_q_out_t,
    stride_q_out_n,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_k_out_b,
    stride_k_out_t,
    stride_k_out_n,
    HEADS_Q: tl.constexpr,
    HEADS_K: tl.constexpr,
    BLOCK_T_Q: tl.constexpr,
    BLOCK_N_Q: tl.constexpr,
    BLOCK_T_K: tl.constexpr,
    BLOCK_N_K: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    tables = (cos_ptr, sin_ptr, positions_ptr, rows, stride_table, stride_positions_b, stride_positions_t)
    program = tl.program_id(0)
    if program < programs_q:
        from_q = (stride_qb, stride_qt, stride_qn)
        to_q = (stride_q_out_b, stride_q_out_t, stride_q_out_n)
        _turn_heads(q_ptr, q_out_ptr, from_q, to_q, tables, program, B, T, direction, HEADS_Q, BLOCK_T_Q, BLOCK_N_Q,
                    H, PAIRS, BLOCK_C, BLOCK_REST, INTERLEAVED)  # fmt: skip
    else:
        if k_ptr is not None:
            from_k = (stride_kb, stride_kt, stride_kn)
            to_k = (stride_k_out_b, stride_k_out_t, stride_k_out_n)
            _turn_heads(k_ptr, k_out_ptr, from_k, to_k, tables, program - programs_q, B, T, direction, HEADS_K,
                        BLOCK_T_K, BLOCK_N_K, H, PAIRS, BLOCK_C, BLOCK_REST, INTERLEAVED)  # fmt: skip


@triton.jit
def _turn_heads(
    x_ptr,
    out_ptr,
    strides,
    out_strides,
    tables,
    program,
    B,
    T,
    direction,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """BLOCK_N heads of BLOCK_T positions, of which there are B * T: the program's own part of them."""
    cos_ptr, sin_ptr, positions_ptr, rows, stride_table, stride_positions_b, stride_positions_t = tables
    blocks: tl.constexpr = (HEADS + BLOCK_N - 1) // BLOCK_N
    position = (program // blocks * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    head = (program % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    b = (position // T).to(tl.int64)
    t = (position % T).to(tl.int64)
    there = position < B * T
    if positions_ptr is not None:
        row = tl.load(positions_ptr + b * stride_positions_b + t * stride_positions_t, mask=there, other=0)
    else:
        row = b * stride_table + t
    pair = tl.arange(0, BLOCK_C)[None, None, :]
    # A position beyond the tables gives NaN: its numbers are known on the device alone.
    known = there & (row >= 0) & (row < rows) & (pair < PAIRS)
    cos = tl.load(cos_ptr + row * PAIRS + pair, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + row * PAIRS + pair, mask=known, other=float("nan")) * direction
    x_ptr += b * strides[0] + t * strides[1] + head.to(tl.int64) * strides[2]
    out_ptr += b * out_strides[0] + t * out_strides[1] + head.to(tl.int64) * out_strides[2]
    there = there & (head < HEADS)
    if INTERLEAVED:
        feature = tl.arange(0, 2 * BLOCK_C)[None, None, :]
        inside = there & (feature < 2 * PAIRS)
        both = tl.load(x_ptr + feature, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (BLOCK_T, BLOCK_N, BLOCK_C, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, (BLOCK_T, BLOCK_N, 2 * BLOCK_C)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + feature, turned, mask=inside)
    else:
        inside = there & (pair < PAIRS)
        first = tl.load(x_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + PAIRS + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + pair, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(
            out_ptr + PAIRS + pair, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside
        )
    if BLOCK_REST:
        feature = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, None, :]
        inside = there & (feature < H)
        tl.store(out_ptr + feature, tl.load(x_ptr + feature, mask=inside), mask=inside)
