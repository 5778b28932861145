"""Context parallelism: a sequence spread over the cp axis, and attention over the whole of it."""

from pypar.context_parallel.attention import ring_attention
from pypar.context_parallel.context import shard_context
from pypar.context_parallel.cost import method_costs
from pypar.context_parallel.layouts import positions, shard, unshard
from pypar.context_parallel.measuring import measure_costs
from pypar.context_parallel.methods import methods

__all__ = [
    "measure_costs",
    "method_costs",
    "methods",
    "positions",
    "ring_attention",
    "shard",
    "shard_context",
    "unshard",
]
