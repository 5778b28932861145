"""Data parallelism: every rank has the whole model and a part of the batch; gradients are summed over
ranks.

Either the wrapped model or the wrapper may be compiled, the latter not with fullgraph=True. A model that is one graph
hands all its gradients over when its backward ends, so nothing is summed beside it: compile its layers one by one.
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.data_parallel.buckets import GradientBuckets
    from pypar.data_parallel.module import DataParallel

__all__ = ["DataParallel", "GradientBuckets"]

# A configuration is checked without torch, also one that says something about this room.
__getattr__ = loader(
    __name__,
    {"DataParallel": "pypar.data_parallel.module", "GradientBuckets": "pypar.data_parallel.buckets"},
    __all__,
)
