"""The ways to treat one block that no other way beats: bytes kept, moved and needed in backward, seconds added."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pypar.recomputation.plan.costs import INPUT, OFFLOAD, RECOMPUTE, BlockCosts, Copying, Piece

MOST = 96  # ways of one block that are looked at further


@dataclass(frozen=True)
class Option:
    """One way to treat a block.

    kept_bytes      on the device between the block's forward and its backward
    moved_bytes     on the host meanwhile
    backward_bytes  on the device in the block's backward: what backward needs, and extras
    added_s         seconds, over keeping all
    choices         one for each piece
    """

    kept_bytes: int
    moved_bytes: int
    backward_bytes: int
    added_s: float
    choices: tuple[str, ...]


def option(block: BlockCosts, choices: Sequence[str], copying: Copying) -> Option:
    """What these choices, one for each of the block's pieces, come to."""
    again = [p for p, c in zip(block.pieces, choices, strict=True) if c == RECOMPUTE and p.saved_bytes]
    until = max((piece.until for piece in again), default=None)
    total = Option(0, 0, block.saved_bytes, 0.0 if until is None else _again_s(block, until), ())
    for piece, choice in zip(block.pieces, choices, strict=True):
        total = _sum(total, _of_piece(block, piece, choice, until))
    moved = total.moved_bytes
    copies_s = sum(copying.added_s(moved, beside) for beside in (block.forward_s, block.backward_s) if moved)
    return replace(total, added_s=total.added_s + copies_s)


def _again_s(block: BlockCosts, until: int) -> float:
    """The seconds of a forward that runs again up to a call, without the calls that pieces are about."""
    of_pieces = {piece.call for piece in block.pieces}
    calls = (seconds for call, seconds in enumerate(block.calls_s[:until]) if call not in of_pieces)
    return block.again_s(until) + sum(calls)


@functools.lru_cache(maxsize=64)
def options(block: BlockCosts, copying: Copying) -> tuple[Option, ...]:
    """The ways that no other beats, with the least seconds first; at most MOST, the extremes among them.

    Choices are made piece by piece for each place at which a forward that runs again may end: pieces that are made
    later must be kept then, and what pieces cost adds up. A choice for some pieces that another beats is left out.
    """
    found: list[Option] = []
    ends = sorted({piece.until for piece in block.pieces if piece.name != INPUT and piece.saved_bytes})
    for until in (None, *ends):
        partial = [Option(0, 0, 0, 0.0, ())]
        for piece in block.pieces:
            ways = [_of_piece(block, piece, choice, until) for choice in _allowed(piece, until, copying)]
            partial = _fewer(_unbeaten(_sum(each, way) for each in partial for way in ways))
        found += (option(block, each.choices, copying) for each in partial)
    return tuple(_fewer(_unbeaten(found)))


def _of_piece(block: BlockCosts, piece: Piece, choice: str, until: int | None) -> Option:
    """What the choice for one piece adds, but for copies, which take time by all that is moved."""
    serves_again = until is not None and (piece.call is None or piece.call < until)
    if choice == RECOMPUTE:
        is_computed = serves_again and piece.call is not None
        return Option(0, 0, 0, block.calls_s[piece.call or 0] if is_computed else 0.0, (choice,))
    extra = piece.extra_bytes if serves_again else 0
    moved = min(piece.moved_bytes, piece.saved_bytes + extra) if choice == OFFLOAD else 0
    return Option(piece.saved_bytes + extra - moved, moved, extra, 0.0, (choice,))


def _sum(a: Option, b: Option) -> Option:
    return Option(
        a.kept_bytes + b.kept_bytes,
        a.moved_bytes + b.moved_bytes,
        a.backward_bytes + b.backward_bytes,
        a.added_s + b.added_s,
        a.choices + b.choices,
    )


def _allowed(piece: Piece, until: int | None, copying: Copying) -> Sequence[str]:
    """The choices for a piece where a forward that runs again ends at `until`; None: where none does."""
    choices = piece.choices(moves=copying.moves)
    if not piece.saved_bytes and piece.name != INPUT:  # kept so as not to be computed again, or not at all
        return (
            choices if until is not None and piece.call is not None and piece.call < until else (RECOMPUTE,)
        )
    if until is None or piece.until > until:
        return [choice for choice in choices if choice != RECOMPUTE]
    return choices


def _unbeaten(found: Iterable[Option]) -> list[Option]:
    """Those that no other is nowhere worse than; the least seconds first."""
    kept: list[Option] = []
    seen: list[tuple[int, int, int]] = []
    order = sorted(
        found, key=lambda each: (each.added_s, each.kept_bytes, each.moved_bytes, each.backward_bytes)
    )
    for each in order:
        a, b, c = each.kept_bytes, each.moved_bytes, each.backward_bytes
        if not any(x <= a and y <= b and z <= c for x, y, z in seen):
            kept.append(each)
            seen.append((a, b, c))
    return kept


def _fewer(found: list[Option]) -> list[Option]:
    """At most MOST of them, evenly over their seconds, with the least of each kind of bytes."""
    if len(found) <= MOST:
        return found
    least = {
        min(range(len(found)), key=lambda i: (key(found[i]), found[i].added_s))
        for key in (
            lambda each: each.kept_bytes,
            lambda each: each.kept_bytes + each.moved_bytes,
            lambda each: each.backward_bytes,
        )
    }
    even = {round(i * (len(found) - 1) / (MOST - 4)) for i in range(MOST - 3)}
    return [found[i] for i in sorted(least | even)]
