"""A ring whose blocks are sent and computed in several parts."""

import threading

import pytest
import torch
from context_cases import CASES, Case, assert_close, inputs, many_ranks, one_device
from simulated_ranks import run_ranks

from pypar.comm import Handle
from pypar.context_parallel import ring, ring_attention
from pypar.context_parallel.layouts import LAYOUTS, Segment, cut, shard


def test_how_many_parts():
    assert [ring.num_parts(2, n) for n in (0, 1, 8191, 8192, 16384, 1 << 20)] == [1, 1, 1, 2, 4, 4]
    assert [ring.num_parts(size, 1 << 20) for size in (1, 2, 3, 4, 5, 8)] == [4, 4, 2, 2, 1, 1]


def test_a_cut_of_what_a_rank_holds():
    held = (Segment(3, 4), Segment(20, 3, 2))
    assert cut(held, 0, 7) == held
    assert cut(held, 2, 5) == (Segment(5, 2), Segment(20, 1, 2))
    assert cut(held, 5, 7) == (Segment(22, 2, 2),)
    assert cut(held, 4, 4) == ()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device_and_sends_as_much_as_whole_blocks(monkeypatch, name, layout):
    case = CASES[name]
    given = inputs(case, torch.float32)
    expected = one_device(case, given)
    for size in (2, 3):
        monkeypatch.setattr(ring, "_LEAST_POSITIONS", 1 << 30)
        _, whole = many_ranks(case, given, size, layout, backend="native")
        monkeypatch.setattr(ring, "_LEAST_POSITIONS", 1)
        actual, sent = many_ranks(case, given, size, layout, backend="native")
        assert_close(actual, expected, 1e-5, 1e-4)
        assert sent == whole


def test_parts_leave_as_soon_as_they_are_computed_and_are_used_as_they_come(monkeypatch):
    monkeypatch.setattr(ring, "_LEAST_POSITIONS", 1)
    events = threading.local()

    def noting(word, function):
        def noted(*arguments):
            if (
                word != "exchange" or arguments[0] or arguments[1]
            ):  # neither sends nor receives: nothing starts
                events.seen.append(word)
            return function(*arguments)

        return noted

    monkeypatch.setattr(ring, "exchange_start", noting("exchange", ring.exchange_start))
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
        # All parts are on their way while the own block computes, and the last ones while the first compute.
        sent = ["wait"] * 4
        assert forward == ["exchange", "compute", *["wait", "compute"] * 4, *sent]
        # The sums of a part go home while the next part computes, the last ones while the own block does.
        arrived = ["wait"] * 4
        later = ["exchange", "compute"] * 4
        assert backward == ["compute", *later, *arrived, *sent]
