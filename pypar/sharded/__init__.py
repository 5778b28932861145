"""Parameters that are cut over an axis, as a user's script sees them: whole tensors of which each rank holds a part.

Every operation of torch on one is either right for the whole tensor or refused by a sentence. The layers take the
plain part with `pypar.layout.local_tensor` and pay nothing for it.
"""

from pypar.sharded.replicas import named_parts, refuse_different_parts, watch_distributed_data_parallel
from pypar.sharded.states import watch_optimizers
from pypar.sharded.tensor import Sharded, shard, support_foreach, wrap

__all__ = ["Sharded", "named_parts", "refuse_different_parts", "shard", "wrap"]

support_foreach()
watch_optimizers()
watch_distributed_data_parallel()
