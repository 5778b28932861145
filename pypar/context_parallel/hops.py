"""What one rank computes at each hop of the ring, from layout and mask; and what the ring sends.

At hop h a rank holds the keys and values of rank - h. A hop is a rectangle of attention: some of this rank's
queries against some of the keys that are there.
"""

from __future__ import annotations

from typing import NamedTuple


class Hop(NamedTuple):
    """The visible part of a hop as ranges of local positions; `causal`: query i of it sees keys 0..i."""

    queries: slice
    keys: slice
    causal: bool


def hops(length: int, rank: int, size: int, layout: str, *, causal: bool) -> list[Hop | None]:
    """One entry for each of the `size` hops: what to compute, or None where the mask hides every key.

    `length` is the number of positions on this rank, the same on every rank. Hop 0 is the rank's own block.
    Source of the zigzag rule: with chunks r and 2R-1-r on rank r, keys from an earlier rank s < r are
    visible to all queries in their first chunk (s) and to none in their second (2R-1-s); keys from a later
    rank are all visible to the second half of the queries and hidden from the first.
    """
    whole, half = slice(0, length), length // 2
    own = Hop(whole, whole, causal)
    if not causal:
        return [own] * size
    earlier: Hop | None
    later: Hop | None
    if layout == "contiguous":
        earlier, later = Hop(whole, whole, False), None
    elif layout == "zigzag":
        earlier, later = Hop(whole, slice(0, half), False), Hop(slice(half, length), whole, False)
    else:
        raise ValueError(f"ring attention has no causal rule for layout {layout!r}; use contiguous or zigzag")
    return [own] + [earlier if hop <= rank else later for hop in range(1, size)]


def forward_bytes(keys_and_values: int, size: int) -> int:
    """Bytes that each rank sends in the forward; `keys_and_values` is the bytes of its own k and v."""
    return (size - 1) * keys_and_values


def backward_bytes(keys_and_values: int, gradients: int, size: int) -> int:
    """Bytes that each rank sends in the backward: k and v R-1 times, their gradients R times.

    The last exchange brings the gradients home. `gradients` is the size in bytes of dk and dv as they travel:
    4 bytes an element whatever the dtype of k and v.
    """
    return (size - 1) * keys_and_values + size * gradients
