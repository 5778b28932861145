"""What a placement comes to, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pypar.data_parallel.chunks.places import Chunks


def told(chunks: Chunks) -> list[str]:
    """Lines: how states are packed; moves and bytes of a step, beside what any placement without residents moves."""
    lines = [
        f"chunks of {str(dtype).removeprefix('torch.')}, {'trained' if is_trained else 'frozen'}: "
        f"{len(packing.chunks)} of {packing.chunk_bytes:,} bytes, {packing.waste:,} bytes of them empty"
        for (dtype, is_trained), packing in chunks.packings.items()
    ]
    budget = chunks.device.budget_bytes
    if chunks.choice is None:
        return [*lines, f"device budget {budget:,} bytes; chunks move when they are used: no placement yet"]
    placement = chunks.choice.placement
    return [
        *lines,
        f"device budget {budget:,} bytes, of which a step takes at most {chunks.peak:,}",
        f"{chunks.choice.families} of {len(chunks.families)} chunks stay on the device with their optimizer states",
        f"a step makes {len(placement.moves)} moves: {placement.to_device:,} bytes to the device and "
        f"{placement.to_host:,} to the host; with none on the device for good, no step moves fewer than "
        f"{chunks.compulsory:,}",
    ]
