"""Joining the job that torchrun, or `pypar train`, started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pypar.comm.backend import BACKENDS
from pypar.train.launch import joined_world_size


def join_job(threads: int) -> torch.device:
    """Join the job that this process is a rank of, if any and not done yet; returns this rank's device.

    threads: of torch on CPU; 0: the machine's cores divided by its ranks.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if (joined_world_size() or 1) > 1 and not dist.is_initialized():
        dist.init_process_group(BACKENDS[device.type])
    return device


@contextlib.contextmanager
def process_group(threads: int) -> Iterator[torch.device]:
    """`join_job`, and leave it at the end; yields this rank's device."""
    yield join_job(threads)
    if dist.is_initialized():
        # Not after an exception: the agent ends the ranks, and closing a group can wait for them.
        dist.destroy_process_group()
