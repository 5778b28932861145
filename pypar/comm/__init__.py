"""Communication over one mesh axis: started collectives, differentiable pairs, point to point, counters.

torch.compile leaves all of it out of its graphs, and with fullgraph=True refuses. torch.func's transforms and
torch.export get a ValueError: what one rank traces is not what all do.
"""

from pypar.comm.allreduce.peers import PeerAllReduce
from pypar.comm.autograd import (
    copy_to,
    gather_from,
    gather_replicated,
    reduce_from,
    reduce_scatter_to,
    split_to,
)
from pypar.comm.backend import register
from pypar.comm.collectives import (
    Handle,
    all_gather_start,
    all_reduce_start,
    local_slice,
    reduce_scatter_start,
)
from pypar.comm.point_to_point import exchange_start, receive_start, send_start
from pypar.comm.shared_tensors import shared_empty, shares_memory
from pypar.comm.traffic import Traffic, wire_bytes

__all__ = [
    "Handle",
    "PeerAllReduce",
    "Traffic",
    "all_gather_start",
    "all_reduce_start",
    "copy_to",
    "exchange_start",
    "gather_from",
    "gather_replicated",
    "local_slice",
    "receive_start",
    "reduce_from",
    "reduce_scatter_start",
    "reduce_scatter_to",
    "send_start",
    "shared_empty",
    "shares_memory",
    "split_to",
    "wire_bytes",
]

register()
