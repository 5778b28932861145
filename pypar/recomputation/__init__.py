"""Activations that backward computes again instead of keeping them, or that wait on the host.

Names are loaded when they are first used: a configuration is checked without torch.
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.recomputation.apply import offload_activations, recompute
    from pypar.recomputation.plan.planner import plan_activations
    from pypar.recomputation.saved_bytes import SavedBytes
    from pypar.recomputation.tiles import tiled

__all__ = ["SavedBytes", "offload_activations", "plan_activations", "recompute", "tiled"]

__getattr__ = loader(
    __name__,
    {
        "SavedBytes": "pypar.recomputation.saved_bytes",
        "offload_activations": "pypar.recomputation.apply",
        "plan_activations": "pypar.recomputation.plan.planner",
        "recompute": "pypar.recomputation.apply",
        "tiled": "pypar.recomputation.tiles",
    },
    __all__,
)
