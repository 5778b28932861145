"""A ring whose blocks are sent and computed in several sub-blocks."""

import itertools
import threading

import pytest
import torch

from pypar.comm import Handle
from pypar.context_parallel import ring_attention
from pypar.context_parallel.layouts import LAYOUTS, Segment, cut, shard
from pypar.context_parallel.methods.ring import buffers as ring_buffers
from pypar.context_parallel.methods.ring import method as ring
from pypar.context_parallel.methods.ring import sub_blocks
from pypar.context_parallel.methods.ring.sub_blocks import rounds_of
from tests.context_parallel.cases import CASES, Case, assert_close, inputs, many_ranks, one_device
from tests.harness.simulated_ranks import run_ranks


def shape(*arguments):
    """How many rounds, groups of heads in each and sub-blocks by keys of each, for the arguments of `rounds_of`."""
    found = rounds_of(*arguments)
    groups = {sub_block.heads.groups.start for sub_block in found[0].sub_blocks}
    return len(found), len(groups), len(found[0].sub_blocks) // len(groups)


def test_how_many_sub_blocks():
    # By heads as far as they go; by keys where messages leave the host or there are enough of them.
    assert shape(8, 2, 2, 4096, True) == (1, 2, 1)
    assert shape(8, 2, 2, 4096, False) == (1, 2, 2)
    assert shape(8, 2, 2, 8192, True) == (1, 2, 2)
    assert [shape(8, G, 2, 4096, False) for G in (1, 4, 8)] == [(1, 1, 2), (1, 4, 1), (1, 4, 1)]
    by_size = [shape(8, 8, size, 4096, True)[1:] for size in (1, 2, 3, 4, 5, 8)]
    assert by_size == [(1, 1), (4, 1), (2, 1), (2, 1), (1, 1), (1, 1)]
    # Long blocks in rounds.
    by_length = [shape(2, 1, 8, n, True) for n in (0, 1, 8192, 8193, 32768)]
    assert by_length == [(1, 1, 1), (1, 1, 1), (1, 1, 1), (2, 1, 1), (4, 1, 1)]
    assert shape(8, 8, 2, 1023, False) == shape(8, 8, 1, 1 << 20, False) == (1, 1, 1)


def test_sub_blocks_are_the_whole():
    for positions in (0, 1, 2047, 8191, 20000):
        held, wholes = torch.zeros(6, positions), torch.zeros(6, positions)
        for round_ in rounds_of(12, 6, 2, positions, False):
            for sub_block, to in [
                (round_.whole, wholes),
                *((sub_block, held) for sub_block in round_.sub_blocks),
            ]:
                begin, end = sub_block.span(positions)
                to[sub_block.heads.groups, begin:end] += 1
                heads = sub_block.heads
                assert heads.queries == slice(2 * heads.groups.start, 2 * heads.groups.stop)
        assert (held == 1).all() and (wholes == 1).all()


def test_a_cut_of_what_a_rank_holds():
    held = (Segment(3, 4), Segment(20, 3, 2))
    assert cut(held, 0, 7) == held
    assert cut(held, 2, 5) == (Segment(5, 2), Segment(20, 1, 2))
    assert cut(held, 5, 7) == (Segment(22, 2, 2),)
    assert cut(held, 4, 4) == ()


SIZES = (2, 3, 4)
ONCE = {
    (name, SIZES[i % len(SIZES)], sorted(LAYOUTS)[i // len(SIZES) % len(LAYOUTS)])
    for i, name in enumerate(CASES)
}


@pytest.mark.parametrize(
    ("name", "size", "layout"),
    [
        pytest.param(*values, marks=() if values in ONCE else pytest.mark.slow)
        for values in itertools.product(CASES, SIZES, sorted(LAYOUTS))
    ],
)
def test_equals_one_device_and_sends_as_much_as_whole_blocks(monkeypatch, name, size, layout):
    """The long tests have every case in every layout at every degree, the quick ones each case in one of them."""
    case = CASES[name]
    given = inputs(case, torch.float32)
    monkeypatch.setattr(sub_blocks, "_LEAST_POSITIONS", 1 << 30)
    monkeypatch.setattr(sub_blocks, "_MOST_KEYS", 1 << 30)
    _, whole = many_ranks(case, given, size, layout, backend="native")
    monkeypatch.setattr(sub_blocks, "_LEAST_POSITIONS", 1)
    monkeypatch.setattr(sub_blocks, "_LEAST_KEYS_FAR", 1)
    monkeypatch.setattr(sub_blocks, "_MOST_KEYS", 4)
    actual, sent = many_ranks(case, given, size, layout, backend="native")
    assert_close(actual, one_device(case, given), 1e-5, 1e-4)
    assert sent == whole


def test_sub_blocks_leave_as_soon_as_they_are_computed_and_are_used_as_they_come(monkeypatch):
    monkeypatch.setattr(sub_blocks, "_LEAST_POSITIONS", 1)
    monkeypatch.setattr(sub_blocks, "_LEAST_KEYS_FAR", 1)
    events = threading.local()

    def noting(word, function):
        def noted(*arguments):
            if (
                word != "exchange" or arguments[0] or arguments[1]
            ):  # neither sends nor receives: nothing starts
                events.seen.append(word)
            return function(*arguments)

        return noted

    monkeypatch.setattr(ring_buffers, "exchange_start", noting("exchange", ring_buffers.exchange_start))
    for name in ("add_forward", "add_backward"):
        monkeypatch.setattr(ring, name, noting("compute", getattr(ring, name)))
    monkeypatch.setattr(Handle, "wait", noting("wait", Handle.wait))
    monkeypatch.setattr(Handle, "is_done", lambda handle: False)  # nothing is let go early

    def attend(axis):
        events.seen = []
        given = inputs(Case(T=16), torch.float32)
        q, k, v = (shard(given[x], 1, axis, "zigzag").requires_grad_() for x in "qkv")
        events.seen = []
        out = ring_attention(q, k, v, axis)
        forward, events.seen = events.seen[1:], []  # without the wait for whether the ranks agree
        out.sum().backward()
        return forward, events.seen

    for forward, backward in run_ranks(2, attend):
        # All sub-blocks are on their way while the own block computes, and the last ones while the first compute.
        sent = ["wait"] * 4
        assert forward == ["exchange", "compute", *["wait", "compute"] * 4, *sent]
        # The sums of a sub-block go home while the next one computes, the last ones while the own block does.
        # Nothing of that waits for sums to arrive.
        arrived = ["wait"] * 4
        assert backward == ["compute", *["exchange", "compute"] * 4, *["compute"] * 3, *arrived, *sent]
