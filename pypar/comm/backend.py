"""torch.distributed learns the backend's name: `init_process_group("pypar")`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from pypar.comm.between_hosts import ProcessGroupBetweenHosts
from pypar.comm.cpu_group import NAME
from pypar.comm.process_group import ProcessGroup
from pypar.comm.shared_memory import host_identity

BACKENDS = {
    "cpu": NAME,
    "cuda": "nccl",
}  # which one of torch.distributed's `pypar train` takes, by type of device


def register() -> None:
    """Makes "pypar" known to torch.distributed, once. Importing pypar.comm does it."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _backend_options: Any) -> dist.ProcessGroup:
    rank, size = options.group_rank, options.group_size
    # torch may give a group the name, and so the store, of one that was destroyed: what that one left is not read.
    turn = options.store.add(f"opened/{rank}", 1)
    store = dist.PrefixStore(str(turn), options.store)
    store.set(f"host/{rank}", host_identity())
    hosts = [store.get(f"host/{r}").decode() for r in range(size)]
    name = f"{options.group_id} (ranks {', '.join(map(str, options.global_ranks_in_group or range(size)))})"
    if len(set(hosts)) > 1:
        return ProcessGroupBetweenHosts(store, rank, hosts, options.timeout, name)
    return ProcessGroup(store, rank, size, options.timeout, name)
