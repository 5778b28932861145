"""All-reduce among the GPUs of a node in Triton: one-shot, two-shot, and one-shot + residual + RMS norm.

Every rank has a buffer that all ranks can read and write: flags, then two slots for data. A flag is a word of its
own for each (set, stage, block, writer), and holds the number of the call that it speaks of, so nothing is ever reset.
Sets and slots alternate from call to call. A block handles the same tiles on every rank and in every stage, so a block
waits only for the same block of the others.

    one-shot: copy x to the own slot | publish, wait | sum all ranks' slots
    two-shot: copy x to the own slot | publish, wait | sum slice `rank` of all slots into the own one
              | publish, wait | gather the other slices

Publishing is an exchange with release at system scope, after a barrier of the block; waiting is a compare-and-swap with
acquire at system scope, before one: the whole block's accesses are ordered by it. There is no barrier at the end of a
call. A slot is written again two calls later; the call between has waited for flags that a rank writes only when all
its blocks have left the call before, reads included, since its kernels run one after another. The same holds for the
sets of flags: with one set a fast rank's next call would overwrite a flag that a slow one has not yet seen.
Call numbers are compared for equality, so they may wrap around.

Sums are in fp32, over ranks in rank order: the same bits on every rank.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

FOREVER = tl.constexpr(2**62)


@triton.jit
def _flags(buffers_ptr, peer, call, stage: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The words that the ranks write to this peer about a stage of this call, for this block."""
    words = tl.load(buffers_ptr + peer).to(tl.pointer_type(tl.int32))
    return words + (((call & 1) * 2 + stage) * BLOCKS + tl.program_id(0)) * RANKS


@triton.jit
def _slot(buffers_ptr, peer, call, x_ptr, header_bytes, slot_bytes):
    """The slot of a peer's buffer for this call, as pointers like x_ptr."""
    address = tl.load(buffers_ptr + peer) + header_bytes + (call & 1) * slot_bytes
    return tl.multiple_of(address.to(x_ptr.dtype), 16)


@triton.jit
def _sum(buffers_ptr, at, mask, call, x_ptr, header_bytes, slot_bytes, RANKS: tl.constexpr):
    """The sum over ranks of elements `at` of their slots, fp32; 0 where a mask, which may be None, leaves them out."""
    total = tl.zeros(at.shape, tl.float32)
    for peer in tl.static_range(RANKS):
        theirs = _slot(buffers_ptr, peer, call, x_ptr, header_bytes, slot_bytes)
        total += tl.load(theirs + at, mask=mask, other=None if mask is None else 0.0).to(tl.float32)
    return total


@triton.jit
def _counters(buffers_ptr, rank, RANKS: tl.constexpr, BLOCKS: tl.constexpr):
    """A block's numbers of calls, after the flags, as many words unused, and its clock."""
    return tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int32)) + 4 * BLOCKS * RANKS


@triton.jit
def _begin(buffers_ptr, rank, RANKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The number of this call: one more than the block's counter, which stands after the flags."""
    counters = _counters(buffers_ptr, rank, RANKS, BLOCKS)
    call = tl.load(counters + tl.program_id(0)) + 1
    tl.debug_barrier()
    tl.store(counters + tl.program_id(0), call)
    return call


@triton.jit
def _late(clock_ptr, polls, started, limit, CLOCK: tl.constexpr):
    """(is it too late, started): every 256 polls, whether more than `limit` nanoseconds have passed since the 256th.

    All threads must see one time, or they would leave the loop apart: what an exchange returns is the same for
    all, here the time of 256 polls ago. Without a clock polls are counted.
    """
    late = polls > limit
    if CLOCK:
        late = polls > FOREVER
        if (polls & 255) == 0:
            earlier = tl.atomic_xchg(clock_ptr, globaltimer(), sem="relaxed", scope="gpu")
            started = tl.where(polls == 512, earlier, started)
            late = (polls >= 512) & (earlier - started > limit)
    return late, started


@triton.jit
def _exchange(
    buffers_ptr,
    error_ptr,
    rank,
    call,
    limit,
    stage: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Tells all ranks that this block has written what `stage` names, and waits until theirs have.

    Past the limit the rank that is missing is written to error_ptr: rank + 1, 8 bits of stage, 32 bits of call, in one
    word, which may lie in the host's memory. Returns the limit for later waits of this call, which is 0 then.
    """
    limit = limit.to(tl.int64)
    tl.debug_barrier()
    for peer in range(RANKS):
        theirs = _flags(buffers_ptr, peer, call, stage, RANKS, BLOCKS) + rank
        tl.atomic_xchg(theirs, call, sem="release", scope="sys")
    own = _flags(buffers_ptr, rank, call, stage, RANKS, BLOCKS)
    clock_ptr = _counters(buffers_ptr, rank, RANKS, BLOCKS).to(tl.pointer_type(tl.int64)) + BLOCKS
    for peer in range(RANKS):
        seen = tl.atomic_cas(own + peer, call, call, sem="acquire", scope="sys")
        polls, started = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
        late = seen != seen
        while (seen != call) & (not late):
            seen = tl.atomic_cas(own + peer, call, call, sem="acquire", scope="sys")
            polls += 1
            late, started = _late(clock_ptr + tl.program_id(0), polls, started, limit, CLOCK)
        if seen != call:
            if tl.load(error_ptr, volatile=True) == 0:  # the first of them is the cause
                tl.store(error_ptr, (call.to(tl.int64) << 16) + (stage << 8) + peer + 1)
            limit = tl.zeros((), tl.int64)
    tl.debug_barrier()
    return limit


@triton.jit(do_not_specialize=["rank", "limit"])
def _one_shot_kernel(
    buffers_ptr,
    error_ptr,
    x_ptr,
    y_ptr,
    numel,
    rank,
    header_bytes,
    slot_bytes,
    limit,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    CLOCK: tl.constexpr,
):
    call = _begin(buffers_ptr, rank, RANKS, BLOCKS)
    num_tiles = tl.cdiv(numel, TILE)
    if tl.program_id(0) < num_tiles:
        own = _slot(buffers_ptr, rank, call, x_ptr, header_bytes, slot_bytes)
        for tile in range(tl.program_id(0), num_tiles, BLOCKS):
            at = tile * TILE + tl.arange(0, TILE)
            tl.store(own + at, tl.load(x_ptr + at, mask=at < numel, other=0.0))
        _exchange(buffers_ptr, error_ptr, rank, call, limit, 0, RANKS, BLOCKS, CLOCK)
        for tile in range(tl.program_id(0), num_tiles, BLOCKS):
            at = tile * TILE + tl.arange(0, TILE)
            total = _sum(buffers_ptr, at, None, call, x_ptr, header_bytes, slot_bytes, RANKS)
            tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit(do_not_specialize=["rank", "limit"])
def _two_shot_kernel(
    buffers_ptr,
    error_ptr,
    x_ptr,
    y_ptr,
    numel,
    rank,
    header_bytes,
    slot_bytes,
    limit,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """A slice is a whole number of tiles; the last ones may be empty."""
    call = _begin(buffers_ptr, rank, RANKS, BLOCKS)
    num_tiles = tl.cdiv(tl.cdiv(numel, RANKS), TILE)
    if tl.program_id(0) < num_tiles:
        own = _slot(buffers_ptr, rank, call, x_ptr, header_bytes, slot_bytes)
        for part in range(RANKS):
            for tile in range(tl.program_id(0), num_tiles, BLOCKS):
                at = (part * num_tiles + tile) * TILE + tl.arange(0, TILE)
                tl.store(own + at, tl.load(x_ptr + at, mask=at < numel, other=0.0))
        rest = _exchange(buffers_ptr, error_ptr, rank, call, limit, 0, RANKS, BLOCKS, CLOCK)
        for tile in range(tl.program_id(0), num_tiles, BLOCKS):
            at = (rank * num_tiles + tile) * TILE + tl.arange(0, TILE)
            total = _sum(buffers_ptr, at, None, call, x_ptr, header_bytes, slot_bytes, RANKS)
            rounded = total.to(y_ptr.dtype.element_ty)
            tl.store(own + at, rounded)  # of this slice only this thread reads the own slot, and it has
            tl.store(y_ptr + at, rounded, mask=at < numel)
        _exchange(buffers_ptr, error_ptr, rank, call, rest, 1, RANKS, BLOCKS, CLOCK)
        for part in range(RANKS):
            if part != rank:
                theirs = _slot(buffers_ptr, part, call, x_ptr, header_bytes, slot_bytes)
                for tile in range(tl.program_id(0), num_tiles, BLOCKS):
                    at = (part * num_tiles + tile) * TILE + tl.arange(0, TILE)
                    tl.store(y_ptr + at, tl.load(theirs + at), mask=at < numel)


@triton.jit(do_not_specialize=["rank", "limit"])
def _residual_norm_kernel(
    buffers_ptr,
    error_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    rows,
    eps,
    rank,
    header_bytes,
    slot_bytes,
    limit,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """One-shot, a row of D at a time."""
    call = _begin(buffers_ptr, rank, RANKS, BLOCKS)
    if tl.program_id(0) < rows:
        columns = tl.arange(0, BLOCK_D)
        inside = columns < D
        own = _slot(buffers_ptr, rank, call, x_ptr, header_bytes, slot_bytes)
        for row in range(tl.program_id(0), rows, BLOCKS):
            at = row * D + columns
            tl.store(own + at, tl.load(x_ptr + at, mask=inside), mask=inside)
        _exchange(buffers_ptr, error_ptr, rank, call, limit, 0, RANKS, BLOCKS, CLOCK)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        for row in range(tl.program_id(0), rows, BLOCKS):
            at = row * D + columns
            total = _sum(buffers_ptr, at, inside, call, x_ptr, header_bytes, slot_bytes, RANKS)
            total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            kept = total.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + at, kept, mask=inside)
            wide = kept.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
            tl.store(out_ptr + at, (wide * rstd * weight).to(out_ptr.dtype.element_ty), mask=inside)
