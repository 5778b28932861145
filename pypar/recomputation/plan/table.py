"""The table of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from pypar.recomputation.plan.choose import Chosen
from pypar.recomputation.plan.costs import RECOMPUTE, BlockCosts


def lines(
    blocks: Sequence[BlockCosts],
    chosen: Chosen,
    budget_bytes: int,
    most: Mapping[str, int],
    num_in_flight: int,
) -> Iterator[str]:
    """What is done with each piece; blocks next to each other that are treated alike are one."""
    yield (
        f"activations: at most {most['device']:,} bytes of {budget_bytes:,}, {most['host']:,} on the host, "
        f"{num_in_flight} in flight, {chosen.added_s * 1e3:.2f} ms more a microbatch than keeping all"
    )
    yield f"  {'blocks':24} {'operator':18} {'bytes':>14}  {'choice':10} ms to make again"
    pairs = list(zip(blocks, chosen.options, strict=True))
    for (_, choices), group in groupby(pairs, key=lambda pair: (pair[0].pieces, pair[1].choices)):
        alike = [block for block, _ in group]
        block = alike[0]
        name = block.name if len(alike) == 1 else f"{block.name} to {alike[-1].name}"
        for piece, choice in zip(block.pieces, choices, strict=True):
            if choice == RECOMPUTE and not piece.saved_bytes:
                continue  # nobody keeps it
            seconds = "-" if piece.call is None else f"{block.calls_s[piece.call] * 1e3:.3f}"
            yield f"  {name:24} {piece.name:18} {piece.num_bytes:14,}  {choice:10} {seconds}"
