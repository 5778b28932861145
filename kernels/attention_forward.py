"""Attention forward: one program a block of queries, and the combination of what programs found in parts of
the keys."""

import triton
import triton.language as tl

from .attention_tiles import (
    LN2,
    NUMBERS,
    dropout_stream,
    kept,
    key_range,
    load_tile,
    locate,
    logits,
    power,
    show_copies,
    start_of,
    unit,
)


@triton.jit
def _first_state(
    out_pointers, out_mask, lse_pointers, row_mask, sinks_ptr, heads, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CARRY: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, output) before the first key. A sink is a key of value 0, a carry one of value out."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if CARRY:
        m = tl.load(lse_pointers, mask=row_mask, other=float("-inf")) * unit(PRECISE)
        weight = tl.where(m == float("-inf"), 0.0, 1.0)
        acc = tl.where(m[:, None] == float("-inf"), 0.0, tl.load(out_pointers, mask=out_mask, other=0.0))
    if sinks_ptr is not None:
        m, weight, acc = _add(m, weight, acc, tl.load(sinks_ptr + heads) * unit(PRECISE), 1.0, 0.0, PRECISE)
    return m, weight, acc


@triton.jit
def _add(m, weight, acc, other_m, other_weight, other_acc, PRECISE: tl.constexpr):
    """The state after two disjoint sets of keys with these states."""
    m_new = tl.maximum(m, other_m)
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
    a = power(m - m_finite, PRECISE)
    b = power(other_m - m_finite, PRECISE)
    return m_new, weight * a + other_weight * b, acc * a[:, None] + other_acc * b[:, None]


@triton.jit
def _last_state(m, weight, acc, PRECISE: tl.constexpr):
    """(out, natural lse); 0 and -inf in rows that saw nothing."""
    empty = weight == 0.0
    weight = tl.where(empty, 1.0, weight)
    lse = m + tl.log2(weight) * LN2 if PRECISE else (m + tl.log2(weight)) * LN2
    return acc / weight[:, None], tl.where(empty, float("-inf"), lse)


@triton.jit(do_not_specialize=NUMBERS)
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, state_ptr, bias_ptr, sinks_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_ks, stride_kg, stride_kh,
    stride_vb, stride_vs, stride_vg, stride_vh,
    stride_ob, stride_ot, stride_on, stride_oh,
    stride_bb, stride_bn, stride_bt, stride_bs, stride_slope,
    B, T, S, N, num_blocks, splits, scale, cap, left_bound, right_bound, q_start, k_start, step, batch_start,
    head_start,
    dropout_threshold, dropout_scale,
    GROUP: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PACK: tl.constexpr, SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CARRY: tl.constexpr,
    SPLIT: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of one sequence: with PACK = 1 queries of one head, else queries of PACK = GROUP heads
    that share a key
    head, so that a short T fills the tile and keys are read once. `splits` programs share the keys of a
    block."""
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    block = program % num_blocks
    program //= num_blocks
    if HAS_RIGHT:
        block = num_blocks - 1 - block  # the longest rows first, the short ones fill the end
    head_blocks = N // PACK
    first_head = program % head_blocks * PACK
    program //= head_blocks
    split = program % splits
    total = T
    batch, q_begin, T, k_begin, S, block = locate(
        cu_q_ptr, cu_k_ptr, block, program // splits, B, T, S, False, PACK, BLOCK_T
    )
    if BOTTOM_RIGHT:
        q_start = S - T
        left_bound += q_start
        right_bound += q_start

    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    t = row // PACK
    heads = first_head + row % PACK
    t_first = block * BLOCK_T // PACK
    t_last = tl.minimum((block * BLOCK_T + BLOCK_T - 1) // PACK, T - 1)
    begin, end, full_begin, full_end = key_range(
        t_first, t_last, S, left_bound, right_bound, HAS_LEFT, HAS_RIGHT, BLOCK_S
    )
    if block * BLOCK_T >= T * PACK:  # no row of this block exists
        end = begin
    share = ((end - begin + BLOCK_S - 1) // BLOCK_S + splits - 1) // splits * BLOCK_S
    begin += split * share
    end = tl.minimum(end, begin + share)

    h = tl.arange(0, BLOCK_H)
    hv = tl.arange(0, BLOCK_HV)
    # With cumulative lengths the batch strides are 0, and lse is [N, T] over all sequences.
    in_lse = heads.to(tl.int64) * total + (q_begin + t)
    if cu_q_ptr is None:
        in_lse += batch.to(tl.int64) * N * total
    q_rows = (q_begin + t).to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qn
    q_pointers = (
        q_ptr + batch.to(tl.int64) * stride_qb + q_rows[:, None] + h[None, :].to(tl.int64) * stride_qh
    )
    q = tl.load(q_pointers, mask=(t[:, None] < T) & (h[None, :] < H), other=0.0)
    out_rows = (q_begin + t).to(tl.int64) * stride_ot + heads.to(tl.int64) * stride_on
    out_pointers = (
        out_ptr + batch.to(tl.int64) * stride_ob + out_rows[:, None] + hv[None, :].to(tl.int64) * stride_oh
    )
    out_mask = (t[:, None] < T) & (hv[None, :] < HV)
    group = first_head // GROUP
    k_base = start_of(k_ptr, batch, stride_kb, k_begin, stride_ks, group, stride_kg)
    v_base = start_of(v_ptr, batch, stride_vb, k_begin, stride_vs, group, stride_vg)

    bias_base = None
    if bias_ptr is not None:
        bias_base = (bias_ptr + batch.to(tl.int64) * stride_bb + heads.to(tl.int64) * stride_bn)[:, None]
    slope = None
    if slopes_ptr is not None:
        slope = (tl.load(slopes_ptr + batch.to(tl.int64) * stride_slope + heads) * unit(PRECISE))[:, None]
    stream = None
    if seed_ptr is not None:
        stream = dropout_stream(seed_ptr, batch_start + batch, head_start + heads)[:, None]

    m, weight, acc = _first_state(
        out_pointers, out_mask, lse_ptr + in_lse, t < T, sinks_ptr, heads, BLOCK_T, BLOCK_HV, CARRY, PRECISE
    )
    for s_start in range(begin, end, BLOCK_S):
        s = s_start + tl.arange(0, BLOCK_S)
        k = load_tile(k_base, s, h, stride_ks, stride_kh, S, H, BLOCK_H)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        x, _ = logits(
            x, t[:, None], s[None, :], T, S, left_bound, right_bound, scale, cap, 0.0, bias_base, stride_bt,
            stride_bs, slope,
            q_start - k_start, step, (s_start < full_begin) | (s_start >= full_end),
            SOFTCAP, PLAIN, PRECISE, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        # PLAIN has a positive scale, so the maximum of the products is where that of the logits is.
        m_new = tl.maximum(m, tl.max(x, 1) * scale) if PLAIN else tl.maximum(m, tl.max(x, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that saw nothing yet
        if PLAIN:
            p = tl.exp2(x * scale - m_finite[:, None])
        else:
            p = power(x - m_finite[:, None], PRECISE)
        correction = power(m - m_finite, PRECISE)
        weight = weight * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        m = m_new
        if stream is not None:
            keep = kept(q_start + step * t[:, None], k_start + step * s[None, :], stream, dropout_threshold)
            p = tl.where(keep, p * dropout_scale, 0.0)
        v = load_tile(v_base, s, hv, stride_vs, stride_vh, S, HV, BLOCK_HV)
        show_copies(FENCE)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if SPLIT:
        # Unnormalised, as the combination wants it: an lse would be rounded once more.
        rows_of_all = N * total
        if cu_q_ptr is None:
            rows_of_all *= B
        rows_before = split.to(tl.int64) * rows_of_all
        part = part_ptr + (rows_before + in_lse)[:, None] * HV + hv[None, :]
        tl.store(part, acc, mask=out_mask)
        state = state_ptr + rows_before * 2 + in_lse
        tl.store(state, m, mask=t < T)
        tl.store(state + rows_of_all, weight, mask=t < T)
    else:
        acc, lse = _last_state(m, weight, acc, PRECISE)
        tl.store(out_pointers, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
        tl.store(lse_ptr + in_lse, lse, mask=t < T)


@triton.jit(do_not_specialize=["rows", "T", "N", "splits"])
def _attention_combine_kernel(
    part_ptr, state_ptr, out_ptr, lse_ptr, sinks_ptr, stride_ob, stride_ot, stride_on, stride_oh,
    rows, T, N, splits, HV: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CARRY: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Joins part [splits, rows, HV] and state [splits, maximum and sum, rows], both fp32, in the order of
    the splits. A
    row is (batch, head, query)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    hv = tl.arange(0, BLOCK_HV)
    t = (row % T).to(tl.int64)
    head = (row // T) % N
    batch = (row // T // N).to(tl.int64)
    mask = (row[:, None] < rows) & (hv[None, :] < HV)
    out_rows = batch * stride_ob + t * stride_ot + head.to(tl.int64) * stride_on
    out_pointers = out_ptr + out_rows[:, None] + hv[None, :].to(tl.int64) * stride_oh
    m, weight, acc = _first_state(
        out_pointers, mask, lse_ptr + row, row < rows, sinks_ptr, head, BLOCK_ROWS, BLOCK_HV, CARRY, PRECISE
    )
    for split in range(splits):
        at = row.to(tl.int64) + tl.full([1], 1, tl.int64) * split * rows
        state = state_ptr + at + tl.full([1], 1, tl.int64) * split * rows
        part_m = tl.load(state, mask=row < rows, other=float("-inf"))
        part_weight = tl.load(state + rows, mask=row < rows, other=0.0)
        part = tl.load(part_ptr + at[:, None] * HV + hv[None, :], mask=mask, other=0.0)
        m, weight, acc = _add(m, weight, acc, part_m, part_weight, part, PRECISE)
    acc, lse = _last_state(m, weight, acc, PRECISE)
    tl.store(out_pointers, acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, lse, mask=row < rows)
