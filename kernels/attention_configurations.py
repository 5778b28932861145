"""The tiles of attention's kernels: rows of queries, columns of keys, warps and pipeline stages."""

from typing import NamedTuple


class Tile(NamedTuple):
    """BLOCK_T queries by BLOCK_S keys, and how a program runs it."""

    BLOCK_T: int
    BLOCK_S: int
    num_warps: int
    num_stages: int


# By class of device, then by padded head size. Of the tiles tried that spill no register when compiled for the class
# (tests/gpu/attention/test_triton_aot.py), mostly the largest; no timing on a device went into this. At head size 256
# the two accumulators of dkdv leave room only for tiles too small for tcgen05 on sm_100. Three stages keep two tiles
# of a loop in shared memory. "other" has 99 KiB of it for a block, sm_80 163, sm_90 and sm_100 227. "fp32" multiplies
# without tensor cores, and each thread holds its share of both operands: small tiles.
FORWARD = {
    "sm_80": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    "sm_90": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "sm_100": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(64, 64, 8, 2)},
    "other": {64: Tile(128, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    "fp32": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# At most 16 rows: what a block reads matters, not what it multiplies.
DECODE = {
    "sm_80": {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)},
    "sm_90": {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)},
    "sm_100": {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)},
    "other": {64: Tile(16, 64, 4, 3), 128: Tile(16, 32, 4, 3), 256: Tile(16, 32, 4, 3)},
    "fp32": {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
}
KEY_GRADIENTS = {
    "sm_80": {64: Tile(32, 128, 8, 3), 128: Tile(32, 64, 8, 3), 256: Tile(32, 32, 8, 2)},
    "sm_90": {64: Tile(64, 128, 8, 3), 128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 2)},
    "sm_100": {64: Tile(64, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    "other": {64: Tile(32, 128, 8, 3), 128: Tile(32, 64, 8, 3), 256: Tile(32, 32, 8, 2)},
    "fp32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
QUERY_GRADIENT = {
    "sm_80": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
    "sm_90": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    "sm_100": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "other": {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(32, 32, 4, 2)},
    "fp32": {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
}
INTERPRETER = Tile(64, 64, 1, 1)


def architecture(capability: tuple[int, int]) -> str:
    """The class of a CUDA device. Parts of one generation with 99 KiB of shared memory (8.6, 8.9, 12.0) are
    "other"."""
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "other")


def choose_tile(table: dict[str, dict[int, Tile]], arch: str, block_h: int, fp32: bool) -> Tile:
    """The entry for a padded head size; the smallest holds for all smaller ones too."""
    if arch == "interpreter":
        return INTERPRETER
    sizes = table["fp32" if fp32 else arch]
    return sizes[max(block_h, min(sizes))]
