"""Context parallelism against one process: layouts, ring attention forward and backward, overlap, bytes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from hypothesis import given
from hypothesis import strategies as st

from pypar.comm import Handle, RingExchange
from pypar.context_parallel import positions, ring, ring_attention, shard, unshard
from pypar.context_parallel.hops import backward_bytes, forward_bytes, hops
from pypar.context_parallel.layouts import LAYOUTS, positions_of
from pypar.mesh import Axis

# --- layouts


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9), st.integers(1, 12))
def test_every_position_is_held_once_and_ranks_hold_equally_many(layout, size, chunk):
    length = 2 * size * chunk
    held = [positions_of(length, rank, size, layout) for rank in range(size)]
    assert {len(part) for part in held} == {length // size}
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    assert all((part.diff() > 0).all() for part in held)


def test_positions():
    assert [positions_of(8, rank, 2, "contiguous").tolist() for rank in (0, 1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [positions_of(8, rank, 2, "zigzag").tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert positions(5, Axis.single("cp"), "zigzag").tolist() == [0, 1, 2, 3, 4]
    assert positions(5, Axis.single("cp"), "zigzag").dtype == torch.int64


def test_layout_refusals():
    zigzag = r"\(1002\) must divide by twice the cp size \(2 x 4\) for the zigzag layout; use 1000 or 1008"
    with pytest.raises(ValueError, match=zigzag):
        positions_of(1002, 0, 4, "zigzag")
    with pytest.raises(ValueError, match=r"\(7\) must divide by the cp size \(2\).*use 6 or 8"):
        positions_of(7, 0, 2, "contiguous")
    with pytest.raises(ValueError, match=r"use 8, or pad"):
        positions_of(3, 0, 4, "zigzag")
    with pytest.raises(ValueError, match="'zig-zag' is not one of contiguous, zigzag; did you mean 'zigzag'"):
        shard(torch.zeros(4), 0, Axis.single("cp"), "zig-zag")


def _round_trip(layout):
    axis = Axis.of(dist.group.WORLD, "cp")
    whole = torch.randn(3, 8 * axis.size, 2, generator=torch.Generator().manual_seed(1))
    for dim, x in ((1, whole), (-2, whole), (0, whole.transpose(0, 1)), (2, whole.movedim(1, 2))):
        part = shard(x, dim, axis, layout)
        assert part.is_contiguous() and part.shape[dim] == 8
        assert torch.equal(part, x.index_select(dim, positions(x.shape[dim], axis, layout)))
        assert torch.equal(unshard(part, dim, dist.group.WORLD, layout), x)
    x = whole.clone().requires_grad_()
    part = shard(x, 1, axis, layout)
    (unshard(part, 1, axis, layout) * whole).sum().backward()
    rows = positions(x.shape[1], axis, layout)
    expected = torch.zeros_like(whole)
    expected[:, rows] = whole[:, rows]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world_size", [2, 4])
def test_unshard_undoes_shard(ranks, layout, world_size):
    ranks(world_size, _round_trip, layout)


def test_shard_of_one_rank_is_the_whole():
    x = torch.randn(2, 5)
    assert shard(x, 1, Axis.single("cp"), "zigzag") is x
    assert unshard(x, 1, Axis.single("cp"), "contiguous") is x


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_hops_cover_the_mask_exactly_once(layout, causal, size):
    length = 6  # on each rank
    held = [positions_of(length * size, rank, size, layout) for rank in range(size)]
    for rank in range(size):
        for hop, item in enumerate(hops(length, rank, size, layout, causal=causal)):
            source = (rank - hop) % size
            visible = (
                held[source][None, :] <= held[rank][:, None] if causal else torch.ones(length, length).bool()
            )
            covered = torch.zeros(length, length, dtype=torch.bool)
            if item is not None:
                block = covered[item.queries, item.keys]
                block |= torch.ones_like(block).tril() if item.causal else torch.ones_like(block)
            assert torch.equal(covered, visible)


def test_zigzag_gives_every_rank_the_same_work():
    def area(item):
        if item is None:
            return 0
        queries, keys = (s.stop - s.start for s in (item.queries, item.keys))
        return queries * (queries + 1) // 2 if item.causal else queries * keys

    work = {
        layout: {sum(area(item) for item in hops(8, rank, 4, layout, causal=True)) for rank in range(4)}
        for layout in LAYOUTS
    }
    assert len(work["zigzag"]) == 1 and len(work["contiguous"]) == 4


# --- ring attention


def _plain_attention(q, k, v, causal):
    """The definition, computed in the dtype of the inputs: out [B, T, N, Hv]."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v)


def _inputs(shape, dtype, seed=3):
    """q, k, v, dout of the whole sequence for shape (B, T, N, G, H, Hv)."""
    b, t, n, g, h, hv = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, t, n, h), (b, t, g, h), (b, t, g, hv), (b, t, n, hv))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def _expected(shape, causal, dtype, of=None):
    """(out, dq, dk, dv) of one process in `dtype`, from inputs that are first rounded to `of`."""
    q, k, v, dout = (x.to(of or dtype).to(dtype) for x in _inputs(shape, of or dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = _plain_attention(*leaves, causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _axis():
    return Axis.of(dist.group.WORLD, "cp") if dist.is_initialized() else Axis.single("cp")


def _run_ring(shape, layout, causal, dtype, backend=None, strided=False):
    """(out, dq, dk, dv) of the whole sequence from a ring over all ranks; bytes sent forward and backward."""
    axis = _axis()
    *leaves, dout = (shard(x, 1, axis, layout) for x in _inputs(shape, dtype))
    if strided:  # as views of something larger, heads before positions
        leaves = [
            torch.cat([x, x], -1).transpose(1, 2).contiguous()[..., : x.shape[-1]].transpose(1, 2)
            for x in leaves
        ]
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [x.requires_grad_() for x in leaves]
    out = ring_attention(*leaves, axis, layout=layout, causal=causal, backend=backend)
    sent_forward = axis.traffic.bytes_sent
    gradients = torch.autograd.grad(out, leaves, dout)
    sent_backward = axis.traffic.bytes_sent - sent_forward
    whole = [unshard(x.detach(), 1, axis, layout) for x in (out, *gradients)]
    assert out.dtype == dtype and all(
        g.dtype == dtype and g.shape == x.shape for g, x in zip(gradients, leaves, strict=True)
    )
    return (whole if axis.rank == 0 else None), sent_forward, sent_backward


def _ring(ranks, world_size, *args):
    results = ranks(world_size, _run_ring, *args) if world_size > 1 else [_run_ring(*args)]
    return results[0][0], [result[1:] for result in results]


SHAPES = {
    "plain": (1, 48, 2, 2, 16, 16),
    "grouped": (2, 40, 6, 2, 8, 8),
    "odd sizes": (1, 56, 3, 1, 13, 13),
    "value size": (1, 24, 4, 2, 16, 24),
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", SHAPES)
def test_equals_one_process_in_fp32(ranks, world_size, layout, causal, case):
    expected = _expected(SHAPES[case], causal, torch.float64, of=torch.float32)
    actual, _ = _ring(ranks, world_size, SHAPES[case], layout, causal, torch.float32)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= (1e-5 if name == "out" else 1e-4), (name, error)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_bf16_error_is_at_most_twice_that_of_plain_bf16_attention(ranks, world_size, layout, causal):
    shape = (1, 128, 4, 2, 32, 32)
    exact = _expected(shape, causal, torch.float64, of=torch.bfloat16)
    plain = _expected(shape, causal, torch.bfloat16)
    actual, _ = _ring(ranks, world_size, shape, layout, causal, torch.bfloat16)
    for name, ours, theirs, reference in zip(("out", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert_accurate(name, ours, theirs, reference, gradient=name != "out")


def test_bf16_error_does_not_grow_with_the_number_of_ranks(ranks):
    shape = (1, 128, 4, 2, 32, 32)
    exact = _expected(shape, True, torch.float64, of=torch.bfloat16)
    errors = {}
    for world_size in (1, 2, 4):
        actual, _ = _ring(ranks, world_size, shape, "zigzag", True, torch.bfloat16)
        errors[world_size] = [
            (ours - e).square().mean().sqrt() for ours, e in zip(actual, exact, strict=True)
        ]
    for world_size in (2, 4):
        for ring_error, single_error in zip(errors[world_size], errors[1], strict=True):
            assert ring_error <= 1.1 * single_error


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_strided_inputs(ranks, layout):
    expected = _expected(SHAPES["grouped"], True, torch.float64, of=torch.float32)
    actual, _ = _ring(ranks, 2, SHAPES["grouped"], layout, True, torch.float32, None, True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() <= 1e-4


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_sent_are_those_of_the_formula(ranks, world_size, dtype):
    shape = (2, 40, 6, 2, 8, 12)
    _, sent = _ring(ranks, world_size, shape, "zigzag", True, dtype)
    elements = 2 * (40 // world_size) * 2 * (8 + 12)  # of k and v on one rank
    for forward, backward in sent:
        assert forward == forward_bytes(elements * dtype.itemsize, world_size)
        assert backward == (
            backward_bytes(elements * dtype.itemsize, elements * 4, world_size) if world_size > 1 else 0
        )


def _record_order():
    """What happens in forward and backward on this rank, in order."""
    events = []

    def noting(word, function):
        def noted(*args, **kwargs):
            events.append(word)
            return function(*args, **kwargs)

        return noted

    originals = RingExchange.start, Handle.wait, ring.attention_forward, ring.attention_backward
    RingExchange.start = noting("start", originals[0])
    Handle.wait = noting("wait", originals[1])
    ring.attention_forward = noting("compute", originals[2])
    ring.attention_backward = noting("compute", originals[3])
    try:
        q, k, v, _ = (
            shard(x, 1, _axis(), "zigzag").requires_grad_()
            for x in _inputs((1, 24, 2, 1, 8, 8), torch.float32)
        )
        events.clear()
        out = ring_attention(q, k, v, _axis())
        forward = list(events)
        events.clear()
        out.sum().backward()
    finally:
        RingExchange.start, Handle.wait, ring.attention_forward, ring.attention_backward = originals
    return forward, events


def test_the_next_exchange_is_in_flight_while_a_hop_computes(ranks):
    for forward, backward in ranks(3, _record_order):
        assert forward == ["start", "compute", "wait", "start", "compute", "wait", "compute"]
        # Per hop: keys leave, the hop computes, sums of gradients arrive and leave, keys arrive.
        assert " ".join(backward) == (
            "start compute start wait  start compute wait start wait  compute wait start  wait".replace(
                "  ", " "
            )
        )


def _gradcheck(causal, layout):
    """gradcheck of the whole: all ranks perturb the same element of the same tensors at the same time."""
    axis = _axis()

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *whole):
            leaves = [shard(x.detach(), 1, axis, layout).requires_grad_() for x in whole]
            with torch.enable_grad():
                ctx.out = ring_attention(*leaves, axis, layout=layout, causal=causal, backend="reference")
            ctx.leaves = leaves
            return unshard(ctx.out.detach(), 1, axis, layout)

        @staticmethod
        def backward(ctx, dout):
            part = shard(dout, 1, axis, layout)
            gradients = torch.autograd.grad(ctx.out, ctx.leaves, part, retain_graph=True)
            return tuple(unshard(g, 1, axis, layout) for g in gradients)

    q, k, v, _ = _inputs((1, 4, 2, 1, 3, 2), torch.float64)
    return torch.autograd.gradcheck(Whole.apply, [x.requires_grad_() for x in (q, k, v)], fast_mode=False)


@pytest.mark.parametrize("causal,layout", list(itertools.product([True, False], sorted(LAYOUTS))))
def test_gradcheck_through_two_ranks(ranks, causal, layout):
    assert ranks(2, _gradcheck, causal, layout) == [True, True]


def test_refusals():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"with one T, but got \(1, 4, 2, 8\), \(1, 6, 2, 8\)"):
        ring_attention(q, k, k, Axis.single("cp"))
    with pytest.raises(ValueError, match="'stripe' is not one of"):
        ring_attention(q, q, q, Axis.single("cp"), layout="stripe")


def _odd_part():
    x = torch.zeros(1, 5, 2, 8)
    with pytest.raises(
        ValueError, match=r"sequence length \(10\) must divide by twice the cp size \(2 x 2\)"
    ):
        ring_attention(x, x, x, dist.group.WORLD)


def test_zigzag_needs_an_even_part(ranks):
    ranks(2, _odd_part)
