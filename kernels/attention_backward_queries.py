"""Attention backward, what is by queries: delta, and dq with dbias, one program a block of queries.

dk and dv have a pass of their own over blocks of keys: together seven products instead of the five of one
pass that adds
dq atomically, but every sum has a fixed order.
"""

import triton
import triton.language as tl

from .attention_tiles import (
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
    store_gradient,
    unit,
)


@triton.jit(do_not_specialize=["rows", "T", "N"])
def _attention_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse_ready_ptr,
    stride_db, stride_dt, stride_dn, stride_dh, stride_ob, stride_ot, stride_on, stride_oh,
    rows, T, N, HV: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_ROWS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """delta = sum(dout * out) - dlse, and lse in the logits' unit, +inf for a row that saw nothing, so that
    its p is 0.
    A row is (batch, head, query)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    t = (row % T).to(tl.int64)[:, None]
    head = ((row // T) % N).to(tl.int64)[:, None]
    batch = (row // T // N).to(tl.int64)[:, None]
    hv = tl.arange(0, BLOCK_HV)[None, :].to(tl.int64)
    mask = (row[:, None] < rows) & (hv < HV)
    dout_pointers = dout_ptr + batch * stride_db + t * stride_dt + head * stride_dn + hv * stride_dh
    out_pointers = out_ptr + batch * stride_ob + t * stride_ot + head * stride_on + hv * stride_oh
    dout = tl.load(dout_pointers, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_pointers, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=row < rows, other=0.0)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)
    tl.store(delta_ptr + row, delta, mask=row < rows)
    tl.store(
        lse_ready_ptr + row,
        tl.where(lse == float("-inf"), float("inf"), lse * unit(PRECISE)),
        mask=row < rows,
    )


@triton.jit(do_not_specialize=NUMBERS)
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ready_ptr, delta_ptr, dq_ptr, dbias_ptr, bias_ptr, slopes_ptr,
    seed_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_ks, stride_kg, stride_kh,
    stride_vb, stride_vs, stride_vg, stride_vh,
    stride_db, stride_dt, stride_dn, stride_dh,
    stride_dqb, stride_dqt, stride_dqn, stride_dqh,
    stride_bb, stride_bn, stride_bt, stride_bs, stride_slope,
    B, T, S, N, G, num_blocks, scale, cap, dscale, left_bound, right_bound, q_start, k_start, step,
    batch_start, head_start,
    dropout_threshold, dropout_scale,
    H: tl.constexpr, HV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, ACCUMULATE: tl.constexpr,
    FENCE: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_T queries of one head."""
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    block = program % num_blocks
    program //= num_blocks
    if HAS_RIGHT:
        block = num_blocks - 1 - block  # the longest rows first, the short ones fill the end
    head = program % N
    total = T
    batch, q_begin, T, k_begin, S, block = locate(
        cu_q_ptr, cu_k_ptr, block, program // N, B, T, S, False, 1, BLOCK_T
    )
    if BOTTOM_RIGHT:
        q_start = S - T
        left_bound += q_start
        right_bound += q_start
    batch = batch.to(tl.int64)
    t_first = block * BLOCK_T
    t = t_first + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    hv = tl.arange(0, BLOCK_HV)
    begin, end, full_begin, full_end = key_range(
        t_first,
        tl.minimum(t_first + BLOCK_T, T) - 1,
        S,
        left_bound,
        right_bound,
        HAS_LEFT,
        HAS_RIGHT,
        BLOCK_S,
    )
    if t_first >= T:  # no query of this block exists
        end = begin

    head_long = head.to(tl.int64)
    group = head // (N // G)
    q_base = start_of(q_ptr, batch, stride_qb, q_begin, stride_qt, head, stride_qn)
    dout_base = start_of(dout_ptr, batch, stride_db, q_begin, stride_dt, head, stride_dn)
    k_base = start_of(k_ptr, batch, stride_kb, k_begin, stride_ks, group, stride_kg)
    v_base = start_of(v_ptr, batch, stride_vb, k_begin, stride_vs, group, stride_vg)
    in_lse = head_long * total + q_begin
    if cu_q_ptr is None:
        in_lse += batch * N * total
    q = load_tile(q_base, t, h, stride_qt, stride_qh, T, H, BLOCK_H)
    dout = load_tile(dout_base, t, hv, stride_dt, stride_dh, T, HV, BLOCK_HV)
    lse_ready = tl.load(lse_ready_ptr + in_lse + t, mask=t < T, other=float("inf"))
    delta = tl.load(delta_ptr + in_lse + t, mask=t < T, other=0.0)
    bias_base = None
    if bias_ptr is not None:
        bias_base = bias_ptr + batch * stride_bb + head_long * stride_bn
    dbias_base = None
    if dbias_ptr is not None:
        dbias_base = dbias_ptr + (batch * N + head_long) * total * S
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * stride_slope + head) * unit(PRECISE)
    stream = None
    if seed_ptr is not None:
        stream = dropout_stream(seed_ptr, batch_start + batch, head_start + head)
    dq = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for s_start in range(begin, end, BLOCK_S):
        s = s_start + tl.arange(0, BLOCK_S)
        k = load_tile(k_base, s, h, stride_ks, stride_kh, S, H, BLOCK_H)
        v = load_tile(v_base, s, hv, stride_vs, stride_vh, S, HV, BLOCK_HV)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        x, ratio = logits(
            x, t[:, None], s[None, :], T, S, left_bound, right_bound, scale, cap, -lse_ready[:, None],
            bias_base, stride_bt, stride_bs, slope,
            q_start - k_start, step, (s_start < full_begin) | (s_start >= full_end),
            SOFTCAP, False, PRECISE, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        p = power(x, PRECISE)
        v_turned = tl.trans(v)
        show_copies(FENCE)
        dp = tl.dot(dout, v_turned, input_precision="ieee")
        if stream is not None:
            keep = kept(q_start + step * t[:, None], k_start + step * s[None, :], stream, dropout_threshold)
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if dbias_base is not None:
            pointers = dbias_base + t[:, None].to(tl.int64) * S + s[None, :]
            tl.store(pointers, ds, mask=(t[:, None] < T) & (s[None, :] < S))
        if SOFTCAP:
            ds = ds * (1 - ratio * ratio)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq_base = start_of(dq_ptr, batch, stride_dqb, q_begin, stride_dqt, head, stride_dqn)
    store_gradient(dq_base, dq * dscale, t, h, stride_dqt, stride_dqh, T, H, ACCUMULATE)
