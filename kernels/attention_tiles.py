"""What attention's kernels share: where a program works, what it loads, how a tile of scores is made.

Positions in a sequence are int32, addresses int64. A tile of scores is [queries, keys] or [keys, queries]:
`t` and
`s` come as [rows, 1] and [1, columns] or the other way round, and everything else broadcasts.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that are not worth a compilation of their own when they are 1 or a multiple of 16.
NUMBERS = [
    *("B", "T", "S", "N", "G", "num_blocks", "splits", "left_bound", "right_bound", "q_start", "k_start"),
    *("step", "batch_start", "head_start", "dropout_threshold"),
]


@triton.jit
def philox(c0, c1, key):
    """Philox 2x32-10 (Salmon et al., SC 2011): two random uint32 for the counter (c0, c1)."""
    for _ in tl.static_range(10):
        product = c0.to(tl.uint64) * 0xD256D193  # one multiplication; umulhi would be a second one
        c0 = (product >> 32).to(tl.uint32) ^ key ^ c1
        c1 = product.to(tl.uint32)
        key = key + 0x9E3779B9
    return c0, c1


@triton.jit
def dropout_stream(seed_ptr, batch, heads):
    """The key of the generator for batch element `batch` (scalar) and each of `heads` [n]: [n] uint32."""
    seed = tl.load(seed_ptr)
    batch = (heads * 0 + batch).to(tl.uint32)
    c0, c1 = philox(batch, heads.to(tl.uint32), (heads * 0 + seed).to(tl.uint32))
    c0, c1 = philox(c0, c1, (heads * 0 + (seed >> 32)).to(tl.uint32))
    return c0


@triton.jit
def kept(query_positions, key_positions, stream, threshold):
    """Which elements dropout keeps. Positions are int32 and wrap."""
    random, _ = philox(key_positions.to(tl.uint32), query_positions.to(tl.uint32), stream)
    return random >= threshold.to(tl.uint32)


@triton.jit
def find_sequence(cu_seqlens_ptr, block, B, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, its first block) of the block-th block, where each sequence has ceil(length * MULTIPLE /
    BLOCK)
    blocks of its own. The sequence is B if there is none. Reads 128 lengths at a time: every block walks
    them all."""
    sequence = block * 0
    first = block * 0
    before = block * 0
    for start in range(0, B, 128):
        index = start + tl.arange(0, 128)
        begin = tl.load(cu_seqlens_ptr + index, mask=index < B, other=0)
        end = tl.load(cu_seqlens_ptr + index + 1, mask=index < B, other=0)
        blocks = (tl.maximum(end - begin, 0) * MULTIPLE + BLOCK - 1) // BLOCK
        passed = (before + tl.cumsum(blocks, 0) <= block) & (index < B)
        sequence += tl.sum(passed.to(tl.int32), 0)
        first += tl.sum(tl.where(passed, blocks, 0), 0)
        before += tl.sum(blocks, 0)
    return sequence, first


@triton.jit
def sequence_range(cu_seqlens_ptr, sequence, B, total):
    """(first token, length) of a sequence. Bounds that overrun are cut: nothing outside the tensor is
    touched."""
    begin = tl.load(cu_seqlens_ptr + sequence, mask=sequence < B, other=0)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < B, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    return begin, end - begin


@triton.jit
def locate(
    cu_q_ptr,
    cu_k_ptr,
    block,
    batch,
    B,
    T,
    S,
    BY_KEYS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where block `block` of the grid works: (batch element, first query token, number of queries, first key
    token,
    number of keys, number of the block inside the sequence)."""
    q_begin = block * 0
    k_begin = block * 0
    if cu_q_ptr is not None:
        if BY_KEYS:
            batch, first = find_sequence(cu_k_ptr, block, B, MULTIPLE, BLOCK)
        else:
            batch, first = find_sequence(cu_q_ptr, block, B, MULTIPLE, BLOCK)
        q_begin, T = sequence_range(cu_q_ptr, batch, B, T)
        k_begin, S = sequence_range(cu_k_ptr, batch, B, S)
        block -= first
    return batch, q_begin, T, k_begin, S, block


@triton.jit
def start_of(x_ptr, batch, stride_batch, row, stride_row, head, stride_head):
    """Where a row of a head of a batch element begins."""
    return (
        x_ptr
        + batch.to(tl.int64) * stride_batch
        + row.to(tl.int64) * stride_row
        + head.to(tl.int64) * stride_head
    )


@triton.jit
def load_tile(
    base, rows, columns, stride_row, stride_column, num_rows, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    """[rows, columns] at `base`; zero past the last row and past the head size SIZE <= COLUMNS."""
    pointers = base + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    mask = rows[:, None] < num_rows
    if SIZE < COLUMNS:
        mask = mask & (columns[None, :] < SIZE)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def show_copies(FENCE: tl.constexpr):
    """Lets the products that follow see what finished copies wrote, on GPUs whose products read by the async proxy.

    cp.async writes by the generic one, and PTX wants a fence in between. Triton sets one before the first of a loop's
    products and takes it to hold for tiles whose copies end only after it.
    """
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def store_gradient(
    base,
    value,
    rows,
    columns,
    stride_row,
    stride_column,
    num_rows,
    SIZE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Writes `value` [rows, columns] at `base`, or adds it to what is there."""
    pointers = base + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    mask = (rows[:, None] < num_rows) & (columns[None, :] < SIZE)
    if ACCUMULATE:
        value += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def tanh(y, PRECISE: tl.constexpr):
    """Absolute error 1e-7; with PRECISE (fp32 inputs) the relative error is that too, by a polynomial near
    zero."""
    decay = tl.exp2(tl.abs(y) * (-2 * LOG2E))
    ratio = (1 - decay) / (1 + decay)
    ratio = tl.where(y < 0, -ratio, ratio)
    if PRECISE:
        z = y * y
        near = y + y * z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835))))
        ratio = tl.where(tl.abs(y) < 0.25, near, ratio)
    return ratio


@triton.jit
def unit(PRECISE: tl.constexpr):
    """What logits are counted in. log2(e) makes them ready for exp2; with fp32 inputs they stay natural, as
    large ones
    lose less where the maximum or lse is subtracted."""
    return tl.constexpr(1.0 if PRECISE else 1.4426950408889634)


@triton.jit
def power(x, PRECISE: tl.constexpr):
    """exp of a logit. With PRECISE exp2 only sees a remainder below 1/2: x * log2(e) rounded loses |x| *
    6e-8, which is
    more than the rest of an fp32 attention."""
    if PRECISE:
        whole = tl.floor(x * LOG2E + 0.5)
        # ln(2) in two parts; the first has 9 bits, so that its product is exact (Cody and Waite).
        rest = (x - whole * 0.693359375) - whole * -2.12194440e-4
        result = tl.where(x > -87.0, tl.exp2(whole) * tl.exp2(rest * LOG2E), 0.0)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def logits(
    x,
    t,
    s,
    T,
    S,
    low,
    high,
    scale,
    cap,
    offset,
    bias_base,
    stride_bt,
    stride_bs,
    slope,
    distance,
    step,
    masked,
    SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Logits plus `offset` of the products x = q . k, and tanh's value where SOFTCAP (else x).

    scale and cap: with SOFTCAP scale / softcap and softcap * unit, else scale * unit and nothing. PLAIN:
    only the mask is
    applied, and the caller folds the scale into an FMA with the subtraction of the maximum. masked: some
    query of the tile
    may not see some key; a branch in one loop, as loops of their own for the tiles at the edges cost
    registers (the
    backward kernels of head size 128 spilled). The offset comes first, so that large terms cancel before
    they are rounded.
    """
    ratio = x
    if slope is not None:
        offset = offset - slope * tl.abs(distance + step * (t - s)).to(tl.float32)
    if bias_base is not None:
        pointers = bias_base + t.to(tl.int64) * stride_bt + s.to(tl.int64) * stride_bs
        bias = tl.load(pointers, mask=(t < T) & (s < S), other=0.0).to(tl.float32)
        offset = offset + bias * unit(PRECISE)
    if SOFTCAP:
        ratio = tanh(x * scale, PRECISE)
        x = ratio * cap + offset
    elif not PLAIN:
        x = x * scale + offset
    if masked:
        seen = s < S
        if HAS_LEFT:
            seen = seen & (s >= t + low)
        if HAS_RIGHT:
            seen = seen & (s <= t + high)
        x = tl.where(seen, x, float("-inf"))
    return x, ratio


@triton.jit
def key_range(
    t_first, t_last, S, low, high, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_S: tl.constexpr
):
    """For queries t_first .. t_last: only keys [begin, end) are seen; blocks that start in [full_begin,
    full_end) are seen
    by all of these queries. begin is a multiple of BLOCK_S."""
    begin = S * 0
    end = S
    full_begin = S * 0
    full_end = S - BLOCK_S + 1
    if HAS_LEFT:
        begin = tl.minimum(tl.maximum(t_first + low, 0), S) // BLOCK_S * BLOCK_S
        full_begin = t_last + low
    if HAS_RIGHT:
        end = tl.minimum(tl.maximum(t_last + high + 1, 0), S)
        full_end = tl.minimum(full_end, t_first + high - BLOCK_S + 2)
    return begin, end, full_begin, full_end
