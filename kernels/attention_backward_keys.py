"""Attention backward, dk and dv: one program a block of keys of one key head, over all query heads of its
group."""

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


@triton.jit(do_not_specialize=NUMBERS)
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ready_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_ks, stride_kg, stride_kh,
    stride_vb, stride_vs, stride_vg, stride_vh,
    stride_db, stride_dt, stride_dn, stride_dh,
    stride_dkb, stride_dks, stride_dkg, stride_dkh,
    stride_dvb, stride_dvs, stride_dvg, stride_dvh,
    stride_bb, stride_bn, stride_bt, stride_bs, stride_slope,
    B, T, S, N, G, num_blocks, scale, cap, dscale, left_bound, right_bound, q_start, k_start, step,
    batch_start, head_start,
    dropout_threshold, dropout_scale,
    H: tl.constexpr, HV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, ACCUMULATE: tl.constexpr,
    FENCE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_S keys of one key head, over all query heads of its group."""
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    block = program % num_blocks  # of a causal mask the first keys have the most queries: they start first
    program //= num_blocks
    group = program % G
    total = T
    batch, q_begin, T, k_begin, S, block = locate(
        cu_q_ptr, cu_k_ptr, block, program // G, B, T, S, True, 1, BLOCK_S
    )
    if BOTTOM_RIGHT:
        q_start = S - T
        left_bound += q_start
        right_bound += q_start
    batch = batch.to(tl.int64)
    s_first = block * BLOCK_S
    s_last = tl.minimum(s_first + BLOCK_S, S) - 1
    s = s_first + tl.arange(0, BLOCK_S)
    h = tl.arange(0, BLOCK_H)
    hv = tl.arange(0, BLOCK_HV)

    # Query t sees key s if s - high <= t <= s - low: a key sees queries as a query sees keys.
    begin, end, full_begin, full_end = key_range(
        s_first, s_last, T, -right_bound, -left_bound, HAS_RIGHT, HAS_LEFT, BLOCK_T
    )
    if s_first >= S:  # no key of this block exists
        end = begin

    k_base = start_of(k_ptr, batch, stride_kb, k_begin, stride_ks, group, stride_kg)
    v_base = start_of(v_ptr, batch, stride_vb, k_begin, stride_vs, group, stride_vg)
    k = load_tile(k_base, s, h, stride_ks, stride_kh, S, H, BLOCK_H)
    v = load_tile(v_base, s, hv, stride_vs, stride_vh, S, HV, BLOCK_HV)
    dk = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_HV], tl.float32)
    for member in range(0, N // G):
        head = group * (N // G) + member
        head_long = head.to(tl.int64)
        q_base = start_of(q_ptr, batch, stride_qb, q_begin, stride_qt, head, stride_qn)
        dout_base = start_of(dout_ptr, batch, stride_db, q_begin, stride_dt, head, stride_dn)
        in_lse = head_long * total + q_begin
        if cu_q_ptr is None:
            in_lse += batch * N * total
        bias_base = None
        if bias_ptr is not None:
            bias_base = bias_ptr + batch * stride_bb + head_long * stride_bn
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * stride_slope + head) * unit(PRECISE)
        stream = None
        if seed_ptr is not None:
            stream = dropout_stream(seed_ptr, batch_start + batch, head_start + head)
        # Tiles are [keys, queries]: the two products that need p and ds take them as they are.
        for t_start in range(begin, end, BLOCK_T):
            t = t_start + tl.arange(0, BLOCK_T)
            q = load_tile(q_base, t, h, stride_qt, stride_qh, T, H, BLOCK_H)
            # lse = +inf takes the rows past the last query out of everything.
            lse_ready = tl.load(lse_ready_ptr + in_lse + t, mask=t < T, other=float("inf"))
            delta = tl.load(delta_ptr + in_lse + t, mask=t < T, other=0.0)
            x = tl.dot(k, tl.trans(q), input_precision="ieee")
            x, ratio = logits(
                x, t[None, :], s[:, None], T, S, left_bound, right_bound, scale, cap, -lse_ready[None, :],
                bias_base, stride_bt, stride_bs,
                slope, q_start - k_start, step, (t_start < full_begin) | (t_start >= full_end),
                SOFTCAP, False, PRECISE, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            p = power(x, PRECISE)
            dout = load_tile(dout_base, t, hv, stride_dt, stride_dh, T, HV, BLOCK_HV)
            dout_turned = tl.trans(dout)
            show_copies(FENCE)
            dp = tl.dot(v, dout_turned, input_precision="ieee")
            p_kept = p
            if stream is not None:
                keep = kept(
                    q_start + step * t[None, :], k_start + step * s[:, None], stream, dropout_threshold
                )
                p_kept = tl.where(keep, p * dropout_scale, 0.0)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * (1 - ratio * ratio)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk_base = start_of(dk_ptr, batch, stride_dkb, k_begin, stride_dks, group, stride_dkg)
    dv_base = start_of(dv_ptr, batch, stride_dvb, k_begin, stride_dvs, group, stride_dvg)
    store_gradient(dk_base, dk * dscale, s, h, stride_dks, stride_dkh, S, H, ACCUMULATE)
    store_gradient(dv_base, dv, s, hv, stride_dvs, stride_dvh, S, HV, ACCUMULATE)
