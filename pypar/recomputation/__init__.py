"""Activations that backward computes again instead of keeping them: whole blocks, chosen operators, tiles.

Names are loaded when they are first used: a configuration is checked without torch.
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.recomputation.apply import recompute
    from pypar.recomputation.saved_bytes import SavedBytes
    from pypar.recomputation.tiles import tiled

__all__ = ["SavedBytes", "recompute", "tiled"]

__getattr__ = loader(
    __name__,
    {
        "SavedBytes": "pypar.recomputation.saved_bytes",
        "recompute": "pypar.recomputation.apply",
        "tiled": "pypar.recomputation.tiles",
    },
    __all__,
)
