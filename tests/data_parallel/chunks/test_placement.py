"""The placement of chunks, proved without a device: any accesses are served, within the room, with few copies."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pypar.data_parallel.chunks.placement import (
    CREATE,
    DEVICE,
    DROP,
    FETCH,
    FLUSH,
    HOST,
    MAKE,
    READ,
    WRITE,
    Access,
    CannotBeError,
    least_room,
    place,
)
from pypar.data_parallel.chunks.residents import Family, choose


@some.composite
def programs(draw, kinds=(READ, WRITE, CREATE), places=(DEVICE, DEVICE, HOST), largest=5, longest=3):
    """(accesses, sizes, moments): each moment has some accesses, no chunk in both places at once."""
    sizes = draw(some.lists(some.integers(1, largest), min_size=1, max_size=5))
    num_moments = draw(some.integers(1, 9))
    accesses = []
    free_from = [0] * len(sizes)
    for moment in range(num_moments):
        for chunk in draw(some.lists(some.integers(0, len(sizes) - 1), max_size=2, unique=True)):
            if moment >= free_from[chunk]:
                where, kind = draw(some.sampled_from(places)), draw(some.sampled_from(kinds))
                length = draw(some.integers(1, longest)) if where == DEVICE else 1
                last = min(moment + length, num_moments) - 1
                accesses.append(Access(moment, chunk, where, kind, last))
                free_from[chunk] = last + 1
    return accesses, sizes, num_moments


@some.composite
def rooms(draw, program):
    """Room of each moment for what it needs at least, and some more."""
    least = least_room(*program)
    return [need + draw(some.integers(0, 8)) for need in least]


@some.composite
def cases(draw, **options):
    program = draw(programs(**options))
    return (*program, draw(rooms(program)))


def replay(accesses, sizes, room, placement):
    """Carry the moves out on numbers that stand for values; AssertionError where an access sees another number."""
    host = [0] * len(sizes)
    device: dict[int, int] = {}
    latest = [0] * len(sizes)
    counter = 0
    moves = list(placement.moves)
    for moment in range(len(room) + 1):
        while moves and moves[0].moment == moment:
            move = moves.pop(0)
            if move.kind in (FETCH, MAKE):
                assert move.chunk not in device, "it is there"
                device[move.chunk] = host[move.chunk] if move.kind == FETCH else -1
            elif move.kind == FLUSH:
                host[move.chunk] = device[move.chunk]
            else:
                assert move.kind == DROP
                del device[move.chunk]
            if move.kind in (FETCH, MAKE):
                assert sum(sizes[chunk] for chunk in device) <= room[moment], f"over the room at {moment}"
        if moment == len(room):
            break
        assert placement.held[moment] == sum(sizes[chunk] for chunk in device)
        for access in accesses:
            if access.moment <= moment <= access.last:
                values = device if access.place == DEVICE else host
                if access.place == DEVICE:
                    assert access.chunk in device
                if access.moment == moment and access.kind != CREATE:
                    assert values[access.chunk] == latest[access.chunk], f"{access} reads an old value"
                if access.moment == moment and access.kind != READ:
                    counter += 1
                    values[access.chunk] = latest[access.chunk] = counter
    assert not moves and not device
    assert host == latest, "what was written is on the host at the end"


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_every_access_is_served_within_the_room(case):
    accesses, sizes, _, room = case
    for ahead in (False, True):
        replay(accesses, sizes, room, place(accesses, sizes, room, ahead=ahead))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_fetching_ahead_costs_no_byte(case):
    accesses, sizes, _, room = case
    early, late = (place(accesses, sizes, room, ahead=ahead) for ahead in (True, False))
    assert (early.to_device, early.to_host) == (late.to_device, late.to_host)


def fewest_fetches(accesses, num_chunks, room):
    """By trying everything: of chunks of one size that are only read on the device."""
    needed = [{a.chunk for a in accesses if a.moment <= moment <= a.last} for moment in range(len(room))]

    @functools.cache
    def best(moment, here):
        if moment == len(room):
            return 0
        coming = needed[moment] - here
        kept = sorted(here - needed[moment])
        found = 1 << 30
        for choice in range(1 << len(kept)):
            stays = {chunk for bit, chunk in enumerate(kept) if choice >> bit & 1}
            after = frozenset(stays | needed[moment])
            if len(after) <= room[moment]:
                found = min(found, len(coming) + best(moment + 1, after))
        return found

    return best(0, frozenset())


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=cases(kinds=(READ,), places=(DEVICE,), largest=1))
def test_copies_to_the_device_are_the_fewest_that_can_be(case):
    accesses, sizes, _, room = case
    assert place(accesses, sizes, room).to_device == fewest_fetches(accesses, len(sizes), room)


def test_the_farthest_next_use_goes():
    accesses = [Access(moment, chunk) for moment, chunk in enumerate((0, 1, 2, 0, 1, 2))]
    kinds = [(m.moment, m.chunk, m.kind) for m in place(accesses, [1] * 3, [2] * 6, ahead=False).moves]
    # Chunk 1 is used at 4 and chunk 0 at 3, so that 1 makes room for 2, and then 0, which is not used again.
    assert kinds[:5] == [(0, 0, FETCH), (1, 1, FETCH), (2, 1, DROP), (2, 2, FETCH), (4, 0, DROP)]


def test_what_was_written_goes_to_the_host_as_soon_as_it_is_final():
    accesses = [Access(0, 0, kind=CREATE), Access(1, 1), Access(2, 1), Access(3, 0, HOST, READ)]
    moves = [(m.moment, m.chunk, m.kind) for m in place(accesses, [1, 1], [2] * 4, ahead=False).moves]
    assert moves == [(0, 0, MAKE), (1, 0, FLUSH), (1, 0, DROP), (1, 1, FETCH), (3, 1, DROP)]


def test_values_that_are_written_anew_are_not_copied_back():
    accesses = [Access(0, 0, kind=CREATE), Access(2, 0, kind=CREATE), Access(3, 0, HOST, READ)]
    assert place(accesses, [7], [7] * 4).to_host == 7


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(program=programs(), missing=some.integers(1, 3))
def test_a_room_too_small_is_refused_with_the_least(program, missing):
    accesses, sizes, num_moments = program
    least = least_room(accesses, sizes, num_moments)
    if not any(least):
        return
    moment = least.index(max(least))
    room = [max(least)] * num_moments
    place(accesses, sizes, room)
    room[moment] -= missing
    with pytest.raises(CannotBeError) as error:
        place(accesses, sizes, room)
    assert error.value.least == max(least) and error.value.moment == moment


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases(), other_bytes=some.integers(0, 3))
def test_residents_never_make_more_moves_and_stay_within_the_room(case, other_bytes):
    accesses, sizes, _, room = case
    families = [Family((chunk,), other_bytes) for chunk in range(len(sizes))]
    chosen = choose(accesses, sizes, room, families)
    assert chosen.placement.moved <= place(accesses, sizes, room).moved
    assert all(held <= most for held, most in zip(chosen.placement.held, room, strict=True))
    assert not {move.chunk for move in chosen.placement.moves} & chosen.chunks


def test_with_room_for_all_everything_stays():
    accesses = [Access(0, 0), Access(1, 1, kind=CREATE), Access(2, 1, HOST, READ), Access(2, 0, HOST, WRITE)]
    chosen = choose(accesses, [4, 4], [20] * 3, [Family((0, 1), 12)])
    assert chosen.families == 1 and chosen.placement.moved == 0 and chosen.placement.held == [20] * 3


def test_a_chunk_cannot_be_used_in_two_places_at_once():
    with pytest.raises(ValueError, match="on the host and on the device at moment 1"):
        place([Access(0, 0, until=1), Access(1, 0, HOST)], [1], [1, 1])
