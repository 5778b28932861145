"""Context parallelism: a sequence spread over the cp axis, and attention over the whole of it."""

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
