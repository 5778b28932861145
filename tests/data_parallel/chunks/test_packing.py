"""Tensors packed into chunks: each once, within its chunk, with the waste that is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pypar.data_parallel.chunks.packing import pack, search
from pypar.data_parallel.chunks.table import LEGAL, State, changed

some_sizes = some.lists(some.integers(0, 200), max_size=30)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(sizes=some_sizes, chunk_bytes=some.integers(1, 300))
def test_every_tensor_lies_in_one_chunk_that_holds_it(sizes, chunk_bytes):
    packing = pack(sizes, chunk_bytes)
    assert sorted(index for chunk in packing.chunks for index in chunk) == list(range(len(sizes)))
    room = 0
    for number, chunk in enumerate(packing.chunks):
        filled = sum(sizes[index] for index in chunk)
        assert list(chunk) == sorted(chunk), "in the order of their use"
        if number in packing.alone:
            assert len(chunk) == 1
            room += filled
        else:
            assert filled <= chunk_bytes
            room += chunk_bytes
    assert packing.waste == room - sum(sizes)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(sizes=some_sizes, most=some.integers(1, 400))
def test_the_search_finds_no_more_waste_than_the_bound_itself_has(sizes, most):
    found = search(sizes, most)
    assert found.chunk_bytes <= most or max(sizes) > most
    assert found.waste <= pack(sizes, most).waste


def test_the_largest_tensor_lies_apart():
    sizes = [10] * 20 + [1000]
    packing = pack(sizes, 2000)
    assert packing.chunks[-1] == (20,) and packing.alone == {1}
    assert search(sizes, 2000).waste == 0


def test_a_size_that_divides_is_found():
    assert search([30, 30, 30, 30], 70).chunk_bytes == 60


def test_no_bytes_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        pack([1], 0)


def test_the_table_has_no_dead_end_and_refuses_all_else():
    for before in State:
        assert LEGAL[before]
        for after in State:
            if after in LEGAL[before]:
                assert changed("chunk 3", before, after) is after
            else:
                with pytest.raises(AssertionError, match="chunk 3 is .* cannot become"):
                    changed("chunk 3", before, after)
