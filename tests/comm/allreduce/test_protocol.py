"""The protocol of csrc/allreduce/protocol.h, by enumeration: every interleaving of 2 and 3 ranks and several calls, on
the late memory of tests/comm/process_group/test_shm_protocol.py. A rank stands for one block of its grid: inside it,
barriers order everything.

It shows that the rules which the header states are enough, and that each one is needed.
"""

import pytest

from tests.comm.process_group.test_shm_protocol import FaultError, Read, Store, Wait, explore


def one_shot(rank, others, call, half, flag, release, acquire):
    """Copy in, say so, wait for all, read all."""
    yield Store(f"data {rank} {half}", call)
    yield from meet(rank, others, call, f"{flag} 0", release, acquire)
    for peer in others:
        yield Read(f"data {peer} {half}", call)


def two_shots(rank, others, call, half, flag, release, acquire):
    """The same with a slice for each rank: read the own one of all, write its sum there, meet again, gather."""
    ranks = sorted([rank, *others])
    for part in ranks:
        yield Store(f"data {rank} {half} {part}", call)
    yield from meet(rank, others, call, f"{flag} 0", release, acquire)
    for peer in others:
        yield Read(f"data {peer} {half} {rank}", call)
    yield Store(f"data {rank} {half} {rank}", reduced(call))
    yield from meet(rank, others, call, f"{flag} 1", release, acquire)
    for peer in others:
        yield Read(f"data {peer} {half} {peer}", reduced(call))


def reduced(call):
    """What stands for the sum."""
    return 2**40 + call


def meet(rank, others, call, flag, release, acquire):
    """The flag of `of` that `by` sets."""
    for peer in others:
        yield Store(f"{flag} of {peer} by {rank}", call, release)
    for peer in others:
        yield Wait(f"{flag} of {rank} by {peer}", (call,), acquire)


def programs(num_ranks, kinds, *, first_call=1, sets=2, halves=2, release=True, acquire=True):
    """What each rank does in the calls: no barrier closes any of them."""
    result = []
    for rank in range(num_ranks):
        others = [peer for peer in range(num_ranks) if peer != rank]
        program = []
        for i, kind in enumerate(kinds):
            call = (first_call + i) % 2**32
            program += kind(rank, others, call, call % halves, f"flag {call % sets}", release, acquire)
        result.append(program)
    return result


ONE, TWO = one_shot, two_shots


@pytest.mark.parametrize(
    ("num_ranks", "kinds"),
    [(2, (ONE, ONE, ONE)), (2, (TWO, TWO, TWO)), (2, (ONE, TWO, ONE)), (2, (TWO, ONE, TWO)), (3, (ONE, ONE, ONE)),
     pytest.param(3, (ONE, TWO, ONE), marks=pytest.mark.slow),
     pytest.param(3, (TWO, TWO, TWO), marks=pytest.mark.slow)],
    ids=lambda x: x if isinstance(x, int) else " ".join(kind.__name__ for kind in x),
)  # fmt: skip
def test_the_protocol_holds(num_ranks, kinds):
    assert explore(programs(num_ranks, kinds)) > 100


@pytest.mark.parametrize("kinds", [(ONE, ONE, ONE, ONE), (TWO, ONE, TWO)])
def test_call_numbers_wrap_around(kinds):
    """A word that nobody has set yet is 0, so the first calls must not be call 0; from then on it is like any other."""
    explore(programs(2, (ONE, ONE, *kinds), first_call=2**32 - 3))


@pytest.mark.parametrize("kind", [ONE, TWO])
@pytest.mark.parametrize(
    ("fault", "planted"),
    [("reads data", {"release": False}), ("reads data", {"acquire": False}), ("reads data", {"halves": 1})],
    ids=["no release", "no acquire", "one half"],
)
def test_every_rule_is_needed(kind, fault, planted):
    with pytest.raises(FaultError, match=fault):
        explore(programs(2, (kind, kind, kind), **planted))


def test_two_sets_of_flags_are_needed():
    """Call c + 1 of a fast peer hides c. Two shots meet twice, so there one set would do; calls are of both kinds."""
    with pytest.raises(FaultError, match="nobody can go on"):
        explore(programs(2, (ONE, ONE, ONE), sets=1))
    with pytest.raises(FaultError, match="nobody can go on"):
        explore(programs(2, (TWO, ONE, ONE), sets=1))
    explore(programs(2, (TWO, TWO, TWO), sets=1))
