"""Which tensors lie in which chunk: chunks of one size, filled in the order in which tensors are used.

All sizes are bytes. Gemini compares lengths in elements with a limit in bytes (ColossalAI#4052).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_SIZES = 64  # that the search of a chunk's size looks at, at most


@dataclass(frozen=True)
class Packing:
    """What lies where.

    chunk_bytes  of every chunk but those of one tensor that is larger
    chunks       indexes of tensors, in the order in which they lie in the chunk
    alone        which chunks hold one tensor each that is apart from the others, and are exactly as large
    waste        bytes of all chunks that no tensor takes
    """

    chunk_bytes: int
    chunks: tuple[tuple[int, ...], ...]
    alone: frozenset[int]
    waste: int


def pack(sizes: Sequence[int], chunk_bytes: int) -> Packing:
    """Fill chunks one after the other; one is closed by the first tensor that does not fit, and never opened again.

    A tensor that is larger than mean + 3 standard deviations, or than a chunk, has a chunk of its own size (Gemini's
    rule): with it in mind the others' chunks would be too large. Closed chunks stay closed so that tensors which are
    used one after the other come together.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes ({chunk_bytes}) must be positive; 64 << 20 is 64 MiB")
    apart = _apart(sizes, chunk_bytes)
    chunks: list[list[int]] = []
    alone = set()
    open_chunk: list[int] | None = None
    filled = waste = 0
    for index, size in enumerate(sizes):
        if index in apart:
            alone.add(len(chunks))
            chunks.append([index])
            continue
        if open_chunk is None or filled + size > chunk_bytes:
            waste += 0 if open_chunk is None else chunk_bytes - filled
            open_chunk, filled = [], 0
            chunks.append(open_chunk)
        open_chunk.append(index)
        filled += size
    waste += 0 if open_chunk is None else chunk_bytes - filled
    return Packing(chunk_bytes, tuple(map(tuple, chunks)), frozenset(alone), waste)


def _apart(sizes: Sequence[int], chunk_bytes: int) -> set[int]:
    mean = sum(sizes) / max(len(sizes), 1)
    sigma = math.sqrt(sum((size - mean) ** 2 for size in sizes) / max(len(sizes), 1))
    return {index for index, size in enumerate(sizes) if size > min(chunk_bytes, mean + 3 * sigma)}


def search(sizes: Sequence[int], most_bytes: int) -> Packing:
    """The packing of least waste whose chunks are at most ``most_bytes``; of equal ones that of the largest chunks.

    Candidates go from the largest tensor that shares a chunk, in even steps, to the bound. A tensor beyond the bound
    has a chunk of its own size.
    """
    shared = [size for index, size in enumerate(sizes) if index not in _apart(sizes, most_bytes)]
    least = max(1, max(shared, default=1))
    step = max(1, (most_bytes - least) // (NUM_SIZES - 1))
    candidates = {least, *range(least, most_bytes + 1, step), max(most_bytes, least)}
    # Fewer bytes in all than one chunk has would be waste of no meaning.
    candidates = {min(size, max(sum(shared), least)) for size in candidates}
    packings = [pack(sizes, size) for size in sorted(candidates)]
    return min(packings, key=lambda packing: (packing.waste, -packing.chunk_bytes))
