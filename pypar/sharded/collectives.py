"""torch.distributed's own collectives on a `Sharded`: between ranks that hold the same part, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pypar.sharded.tensor import Sharded


def _in_place(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """all_reduce, broadcast and reduce over a group that has no two ranks of the axis."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Sharded)]
    groups = [x for x in (*args, *kwargs.values()) if isinstance(x, dist.ProcessGroup)]
    ranks = dist.get_process_group_ranks(groups[0] if groups else dist.group.WORLD)
    for x in tensors:
        sharding = x._pypar_sharding
        if len(set(ranks) & set(sharding.axis.ranks)) > 1:
            raise ValueError(
                f"{name} over the ranks {ranks} would add up or overwrite different parts of {sharding}; give a group "
                "that has one rank of that axis, such as mesh.data.group, or the plain part x.local()"
            )
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


HANDLERS: dict[str, Callable[..., Any]] = dict.fromkeys(("all_reduce", "broadcast", "reduce"), _in_place)
