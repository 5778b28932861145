"""Ring attention against one process: output, gradients, rounding, overlap, bytes."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pypar.comm import Handle
from pypar.context_parallel import ring_attention, shard, unshard
from pypar.context_parallel.layouts import LAYOUTS
from pypar.context_parallel.methods.ring import buffers as ring_buffers
from pypar.context_parallel.methods.ring import method as ring
from pypar.context_parallel.methods.ring import sub_blocks
from pypar.mesh import Axis
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import judge_result
from pypar.selftest.orders import InOrder
from tests.context_parallel.cases import CASES, assert_close, inputs, on_rank, one_device, together
from tests.harness.events import note


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
    out = plain_attention(*leaves, causal=causal, return_lse=False)
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
    with InOrder(0):
        plain = _expected(shape, causal, torch.bfloat16)
    actual, _ = _ring(ranks, world_size, shape, layout, causal, torch.bfloat16)
    for name, ours, theirs, reference in zip(("out", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        judge_result(name, ours, [theirs], reference, gradient=name != "out").check()


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
    block = elements * dtype.itemsize
    for forward, backward in sent:
        assert forward == (world_size - 1) * (block + 16)  # 16 bytes: whether the ranks agree
        assert backward == max(0, world_size - 2) * block + (world_size - 1) * elements * 4


def _record_order():
    """What happens in forward and backward on this rank, in order."""
    events = []

    noting = partial(note, events)
    originals = ring_buffers.exchange_start, Handle.wait, Handle.is_done, ring.add_forward, ring.add_backward
    q, k, v, _ = (
        shard(x, 1, _axis(), "zigzag").requires_grad_() for x in _inputs((1, 24, 2, 1, 8, 8), torch.float32)
    )
    ring_attention(q, k, v, _axis())  # whether the ranks agree is not noted
    ring_buffers.exchange_start = noting("start", originals[0])
    ring.add_forward, ring.add_backward = (noting("compute", function) for function in originals[3:])
    Handle.wait = noting("wait", originals[1])
    Handle.is_done = lambda handle: False  # nothing is let go early
    try:
        out = ring_attention(q, k, v, _axis())
        forward = list(events)
        events.clear()
        out.sum().backward()
    finally:
        ring_buffers.exchange_start, Handle.wait, Handle.is_done, ring.add_forward, ring.add_backward = (
            originals
        )
    return forward, events


def test_the_next_exchange_is_in_flight_while_a_hop_computes(ranks):
    for forward, backward in ranks(3, _record_order):
        # What a hop needs is waited for before it, after what is sent on has started; what was sent, a hop later.
        assert forward == [
            *("wait", "start", "compute"),
            *("wait", "start", "compute", "wait"),
            *("start", "wait", "compute", "wait"),
        ]
        # Keys for the hop after this one, then sums on their way, then sums that go home.
        assert backward == [
            *("start", "compute"),
            *("start", "wait", "compute", "wait", "wait"),
            *("start", "compute", "wait", "wait", "wait"),
        ]


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


def _case(name, layout):
    case = CASES[name]
    return on_rank(_axis(), case, inputs(case, torch.float32), layout, {})[0]


@pytest.mark.parametrize("world_size,layout", [(2, "striped"), (4, "zigzag"), (4, "contiguous")])
@pytest.mark.parametrize("name", ["everything", "documents, everything", "documents, cross", "short"])
def test_every_option_between_processes(ranks, world_size, layout, name):
    case = CASES[name]
    actual = together(case, layout, ranks(world_size, _case, name, layout))
    assert_close(actual, one_device(case, inputs(case, torch.float32)), 1e-5, 1e-4)


def _case_in_sub_blocks(name, layout):
    """Several rounds, each of several sub-blocks by heads and by keys."""
    small = {"_LEAST_POSITIONS": 1, "_LEAST_KEYS": 1, "_LEAST_KEYS_FAR": 1, "_MOST_KEYS": 6}
    with mock.patch.multiple(sub_blocks, **small):
        return _case(name, layout)


@pytest.mark.parametrize("world_size,layout", [(2, "zigzag"), (4, "striped")])
@pytest.mark.parametrize("name", ["everything", "documents, everything"])
def test_sub_blocks_and_rounds_between_processes(ranks, world_size, layout, name):
    case = CASES[name]
    actual = together(case, layout, ranks(world_size, _case_in_sub_blocks, name, layout))
    assert_close(actual, one_device(case, inputs(case, torch.float32)), 1e-5, 1e-4)
