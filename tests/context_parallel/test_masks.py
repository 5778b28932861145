"""Masks as rectangles: every visible pair in one piece, once; no work and no message without a visible pair."""

import bisect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pypar.context_parallel.layouts import LAYOUTS, num_positions, positions_of, segments_of
from pypar.context_parallel.masks import Mask, pieces, visible, work
from pypar.context_parallel.methods.ring.route import KEYS, SUMS, rank_route, route
from pypar.ops.attention.arguments import UNBOUNDED


def _seen(queries, keys, mask):
    """By the definition, for global positions: bool [queries, keys]."""
    seen = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for i, t in enumerate(queries):
        for j, s in enumerate(keys):
            document = bisect.bisect_right(mask.queries, t) - 1
            if document != bisect.bisect_right(mask.keys, s) - 1:
                continue
            (q_from, q_to), (k_from, k_to) = (x[document : document + 2] for x in (mask.queries, mask.keys))
            distance = (t - q_from + (k_to - k_from) - (q_to - q_from)) - (s - k_from)
            left, right = (x if x != UNBOUNDED else 10**9 for x in (mask.left, mask.right))
            seen[i, j] = -right <= distance <= left
    return seen


def _covered(found, num_rows, num_keys, mask):
    """How often the op would see each pair, from the pieces alone: int [rows, keys]."""
    covered = torch.zeros(num_rows, num_keys, dtype=torch.int64)
    for piece in found:
        at, pairs = piece.positions, 0
        rows_ends = piece.cu_seqlens_q or (0, piece.rows.stop - piece.rows.start)
        keys_ends = piece.cu_seqlens_k or (0, piece.keys.stop - piece.keys.start)
        assert rows_ends[-1] == piece.rows.stop - piece.rows.start
        assert keys_ends[-1] == piece.keys.stop - piece.keys.start
        for document in range(piece.num_documents):
            (r0, r1), (k0, k1) = (ends[document : document + 2] for ends in (rows_ends, keys_ends))
            t, s = at.step * torch.arange(r1 - r0) + at.q_start, at.step * torch.arange(k1 - k0) + at.k_start
            distance = t[:, None] - s
            inside = torch.ones_like(distance, dtype=torch.bool)
            if piece.masked and mask.left != UNBOUNDED:
                inside &= distance <= mask.left
            if piece.masked and mask.right != UNBOUNDED:
                inside &= -distance <= mask.right
            rows = slice(piece.rows.start + r0, piece.rows.start + r1)
            covered[rows, piece.keys.start + k0 : piece.keys.start + k1] += inside
            pairs += int(inside.sum())
            if piece.cu_seqlens_q is None:  # cut off where nothing is seen
                assert inside.any(1).all() and inside.any(0).all()
        assert piece.pairs == pairs > 0
    return covered


@st.composite
def _masks(draw):
    length_q = draw(st.integers(0, 24))
    length_k = length_q if draw(st.booleans()) else draw(st.integers(0, 24))
    side = st.one_of(st.just(UNBOUNDED), st.integers(0, 8))
    left, right = draw(side), draw(st.one_of(st.just(0), side))
    queries, keys = (0, length_q), (0, length_k)
    if draw(st.booleans()):
        cuts = draw(st.integers(0, 5))

        def ends(length):
            inner = draw(st.lists(st.integers(0, length), min_size=cuts, max_size=cuts))
            return (0, *sorted(inner), length)

        queries = ends(length_q)
        keys = queries if length_q == length_k and draw(st.booleans()) else ends(length_k)
    return Mask(left, right, queries, keys)


@settings(max_examples=150, deadline=None)
@given(_masks(), st.integers(1, 6), st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_pieces_cover_the_mask_exactly_once(mask, size, layout, merge):
    for rank in range(size):
        queries = segments_of(mask.length_q, rank, size, layout)
        at = positions_of(mask.length_q, rank, size, layout).tolist()
        for source in range(size):
            keys = segments_of(mask.length_k, source, size, layout)
            seen = _seen(at, positions_of(mask.length_k, source, size, layout).tolist(), mask)
            found = pieces(queries, keys, mask, merge)
            assert torch.equal(_covered(found, *seen.shape, mask), seen.long())
            assert visible(queries, keys, mask) == bool(seen.any())


@settings(max_examples=150, deadline=None)
@given(_masks(), st.integers(1, 8), st.sampled_from(sorted(LAYOUTS)))
def test_the_route_brings_what_is_seen_and_nothing_else(mask, size, layout):
    """Follows the table as the ranks do: a rank sends only what it has, and has in time what it computes with."""
    queries, keys = (
        tuple(segments_of(length, rank, size, layout) for rank in range(size))
        for length in (mask.length_q, mask.length_k)
    )
    table = route(queries, keys, mask)
    for rank in range(size):
        seen = [h for h in range(1, size) if visible(queries[rank], keys[(rank - h) % size], mask)]
        assert list(table.hops[rank]) == [0, *seen]
    held = [{rank} for rank in range(size)]
    kept = [None] * size
    for hop in range(size):
        for rank in range(size):
            if hop in table.hops[rank]:
                assert (rank - hop) % size in held[rank]
                kept[rank] = (rank - hop) % size
        assert all(t.kind == KEYS and t.source in held[t.sender] for t in table.forward[hop])
        for transfer in table.forward[hop]:
            held[transfer.receiver].add(transfer.source)
    held = [{rank, kept[rank]} for rank in range(size)]
    sums = [{} for _ in range(size)]  # of each rank, by source: which ranks' shares they hold
    for hop in reversed(range(size)):
        moving = [(t, sums[t.sender].pop(t.source)) for t in table.backward[hop] if t.kind == SUMS]
        for transfer in table.backward[hop]:
            assert transfer.kind == SUMS or transfer.source in held[transfer.sender]
        for rank in range(size):
            if hop in table.hops[rank]:
                assert (rank - hop) % size in held[rank]
                sums[rank][(rank - hop) % size] = {rank}
        for transfer in table.backward[hop]:
            if transfer.kind == KEYS:
                held[transfer.receiver].add(transfer.source)
        for transfer, shares in moving:
            assert not sums[transfer.receiver][transfer.source] & shares
            sums[transfer.receiver][transfer.source] |= shares
    for source in range(size):
        sharers = {rank for rank in range(size) if (rank - source) % size in table.hops[rank]}
        assert sums[source] == {source: sharers}
    for rank in range(size):
        mine = rank_route(queries, keys, mask, rank)
        for direction in ("forward", "backward"):
            for hop, transfers in enumerate(getattr(table, direction)):
                expected = [t for t in transfers if rank in (t.sender, t.receiver)]
                assert list(getattr(mine, direction)[hop]) == expected
                assert sum(t.receiver == rank and t.kind == KEYS for t in expected) <= 1


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("merge", [True, False])
def test_segments_of_several_ranks_in_any_order(layout, merge):
    """As one rank of a ring holds them whose positions others have gathered."""
    mask = Mask(UNBOUNDED, 0, (0, 21), (0, 21))
    unions = [sum((segments_of(21, rank, 4, layout) for rank in ranks), ()) for ranks in ((0, 1), (3, 2))]
    at = [
        torch.cat([positions_of(21, rank, 4, layout) for rank in ranks]).tolist()
        for ranks in ((0, 1), (3, 2))
    ]
    for queries, t in zip(unions, at, strict=True):
        for keys, s in zip(unions, at, strict=True):
            seen = _seen(t, s, mask)
            covered = _covered(pieces(queries, keys, mask, merge), *seen.shape, mask)
            assert torch.equal(covered, seen.long())


def _route(length, size, layout, left=UNBOUNDED, right=0):
    held = tuple(segments_of(length, rank, size, layout) for rank in range(size))
    return route(held, held, Mask(left, right, (0, length), (0, length)))


def test_a_window_makes_as_many_hops_as_it_reaches():
    for left, hops in ((0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3)):
        assert max(map(max, _route(64, 8, "contiguous", left).hops)) == hops


def test_most_blocks_of_the_backward_begin_where_the_forward_left_them():
    def moved(table, direction, kind):
        return sum(t.kind == kind for transfers in getattr(table, direction) for t in transfers)

    for size in (2, 3, 8):
        table = _route(16 * size, size, "zigzag")
        assert moved(table, "forward", KEYS) == size * (size - 1)
        assert moved(table, "backward", KEYS) == size * (size - 2)
        assert moved(table, "backward", SUMS) == size * (size - 1)
        table = _route(16 * size, size, "contiguous")
        assert moved(table, "forward", KEYS) == moved(table, "backward", SUMS) == size * (size - 1) // 2


def test_zigzag_and_striped_give_every_rank_the_same_work():
    length, size = 64, 4
    mask = Mask(UNBOUNDED, 0, (0, length), (0, length))

    def shares(layout):
        held = [segments_of(length, rank, size, layout) for rank in range(size)]
        return [sum(work(pieces(queries, keys, mask)) for keys in held) for queries in held]

    assert len(set(shares("zigzag"))) == 1
    assert max(shares("striped")) <= 1.1 * min(shares("striped"))
    assert max(shares("contiguous")) > 6 * min(shares("contiguous"))


@pytest.mark.parametrize("merge", [True, False])
def test_zigzag_pieces_of_a_causal_mask(merge):
    mask = Mask(UNBOUNDED, 0, (0, 24), (0, 24))
    held = [segments_of(24, rank, 3, "zigzag") for rank in range(3)]
    shapes = [[(p.rows, p.keys, p.masked) for p in pieces(held[1], keys, mask, merge)] for keys in held]
    whole, first, second = slice(0, 8), slice(0, 4), slice(4, 8)
    if merge:
        assert shapes == [[(whole, first, False)], [(whole, whole, True)], [(second, whole, False)]]
    else:
        assert shapes[0] == [(first, first, False), (second, first, False)]
        assert shapes[1] == [(first, first, True), (second, first, False), (second, second, True)]
        assert shapes[2] == [(second, whole, False)]


def test_documents_inside_a_chunk_are_one_piece():
    ends = (0, 2, 5, 5, 9, 16)
    mask = Mask(UNBOUNDED, 0, ends, ends)
    chunk = segments_of(16, 0, 2, "contiguous")  # positions 0 to 7: the last document begins in it
    (piece,) = pieces(chunk, chunk, mask)
    assert piece.cu_seqlens_q == piece.cu_seqlens_k == (0, 2, 5, 5, 8)
    assert (piece.positions.batch_start, piece.pairs, num_positions(chunk)) == (0, 3 + 6 + 0 + 6, 8)
    (spanning,) = pieces(segments_of(16, 1, 2, "contiguous"), chunk, mask)
    assert (spanning.rows, spanning.keys, spanning.masked) == (slice(0, 1), slice(5, 8), False)
    assert spanning.positions.batch_start == 3
