"""What torch asks of a process group besides collectives."""

# mypy: disable-error-code="override"

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

NAME = "pypar"


class CpuProcessGroup(dist.ProcessGroup):
    """A group of `size` ranks for CPU tensors that is its own, and only, backend."""

    def __init__(self, rank: int, size: int, name: str) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size, self._name = rank, size, name

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    name = getBackendName

    def _set_group_name(self, name: str) -> None:
        """torch's name of the group, by which it takes it out of its register after the group is destroyed."""
        super()._set_group_name(name)  # type: ignore[arg-type]
        self._name = name

    @property
    def group_name(self) -> str:
        return c10d._world.pg_names.get(self, self._name)

    @property
    def supports_splitting(self) -> bool:
        return False

    # The checkpoints' background saving and state_dict broadcasts ask for these.

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> CpuProcessGroup:
        if torch.device(device).type != "cpu":
            raise RuntimeError(f'the backend "{NAME}" is for CPU tensors, not for {device}')
        return self
