"""The ranks that set something up together: every step succeeds on all of them or fails on all with one reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """What setting up needs of a process group. token: a number of rank 0's, the same on all ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.token = 0

    def gather(self, value: object) -> list[Any]:
        """Every rank's value, by rank. Collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce(self, x: Tensor) -> None:
        """The group's own sum, in place."""
        dist.all_reduce(x, group=self.group)

    def agree(self, what: str, step: Callable[[], object]) -> list[Any]:
        """Every rank's result of a step. Collective. RuntimeError on all ranks where the step raised on any."""
        try:
            mine: tuple[object, str | None] = (step(), None)
        except (RuntimeError, OSError, MemoryError, ValueError) as error:
            mine = (None, str(error) or type(error).__name__)
        answers = self.gather(mine)
        failed = [
            f"{what} failed on rank {rank}: {reason}" for rank, (_, reason) in enumerate(answers) if reason
        ]
        if failed:
            raise RuntimeError(failed[0])
        return [value for value, _ in answers]
