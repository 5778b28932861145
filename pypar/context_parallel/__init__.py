"""Context parallelism: a sequence spread over the cp axis, and attention over the whole of it."""

from pypar.context_parallel.layouts import positions, shard, unshard
from pypar.context_parallel.ring import ring_attention

__all__ = ["positions", "ring_attention", "shard", "unshard"]
