"""Context parallelism: a sequence spread over the cp axis, and attention over the whole of it.

Names are loaded when they are first used: a configuration is checked without torch.
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.context_parallel.attention import ring_attention
    from pypar.context_parallel.auto.choose import method_costs
    from pypar.context_parallel.auto.measure import measure_costs
    from pypar.context_parallel.layouts import positions, shard, unshard

__all__ = [
    "measure_costs",
    "method_costs",
    "positions",
    "ring_attention",
    "shard",
    "unshard",
]

__getattr__ = loader(
    __name__,
    {
        "measure_costs": "pypar.context_parallel.auto.measure",
        "method_costs": "pypar.context_parallel.auto.choose",
        "positions": "pypar.context_parallel.layouts",
        "ring_attention": "pypar.context_parallel.attention",
        "shard": "pypar.context_parallel.layouts",
        "unshard": "pypar.context_parallel.layouts",
    },
    __all__,
)
