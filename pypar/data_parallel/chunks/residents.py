"""Which chunks lie on the device for good: optimizer states that are updated there, and what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.data_parallel.chunks.placement import Access, CannotBeError, Placement, place


@dataclass(frozen=True)
class Family:
    """What lies together: chunks that also move alone, and bytes that go where they are.

    chunks       rows of parameters and their gradients, of the same elements
    other_bytes  masters and optimizer states of those elements, which are read and written by the update alone
    """

    chunks: tuple[int, ...]
    other_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """families: how many, of the first ones, lie on the device for good. chunks: theirs."""

    families: int
    chunks: frozenset[int]
    placement: Placement


def choose(
    accesses: Sequence[Access],
    sizes: Sequence[int],
    room: Sequence[int],
    families: Sequence[Family],
) -> Choice:
    """The placement of fewest bytes moved over all numbers of families on the device; of equal ones the fewest.

    A family there is updated there: neither its gradients nor its new rows travel. It takes the room of others, which
    travel more often then. CannotBeError where not even none leaves room enough.
    """
    best = Choice(0, frozenset(), place(accesses, sizes, room))
    chunks: set[int] = set()
    other_bytes = 0
    for index, family in enumerate(families):
        chunks |= set(family.chunks)
        other_bytes += family.other_bytes
        try:
            found = place(accesses, sizes, [each - other_bytes for each in room], residents=chunks)
        except CannotBeError:
            break
        if found.moved < best.placement.moved:
            found.held = [each + other_bytes for each in found.held]
            best = Choice(index + 1, frozenset(chunks), found)
    return best
