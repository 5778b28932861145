"""An axis of a mesh as one rank sees it: the process group of its ranks, and what is sent over it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pypar.comm.traffic import Traffic
from pypar.grid import Grid


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a mesh, or a product of axes, as this rank sees it.

    group is None exactly where size is 1; rank is this rank's index on the axis; ranks are the global ranks
    on it, in order. A copy of a module shares its axes (copying, shallow or deep, returns the same object).
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    size: int
    ranks: tuple[int, ...]
    traffic: Traffic
    product: Grid | None = None  # of several axes; None: of one

    @functools.cached_property
    def grid(self) -> Grid:
        """The axes of the mesh that this one is the product of, by name; this rank is at `rank` in it."""
        return Grid({self.name: self.size}) if self.product is None else self.product

    @classmethod
    def single(cls, name: str, product: Grid | None = None) -> Axis:
        """An axis of one rank, which needs no process group."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return cls(name, None, 0, 1, (rank,), Traffic(name), product)

    @classmethod
    def of(cls, group: dist.ProcessGroup, name: str = "group", product: Grid | None = None) -> Axis:
        """An axis over the ranks of a process group that this rank belongs to."""
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"rank {dist.get_rank()} is not in the process group that axis {name!r} was to wrap; "
                "make the axis on the group's own ranks only"
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return cls.single(name, product)
        return cls(name, group, group.rank(), len(ranks), ranks, Traffic(name), product)

    @property
    def names(self) -> tuple[str, ...]:
        """The axes of the mesh that this one is the product of, outermost first."""
        return tuple(self.grid.sizes)

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The axis as a DeviceMesh of one dim, the same object each time; for an axis of at least two ranks."""
        made: dict[str, DeviceMesh] = self._device_meshes
        if device_type not in made:
            assert self.group is not None
            made[device_type] = DeviceMesh.from_group(
                self.group, device_type, mesh=list(self.ranks), mesh_dim_names=(self.name,)
            )
        return made[device_type]

    @functools.cached_property
    def _device_meshes(self) -> dict[str, DeviceMesh]:
        return {}

    def __copy__(self) -> Axis:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self

    def __reduce__(self) -> Any:
        raise ValueError(
            f"axis {self.name!r} is not pickled, for its process group belongs to this job; save a model's "
            "state_dict() with torch.distributed.checkpoint"
        )


def as_axis(group_or_axis: Axis | dist.ProcessGroup) -> Axis:
    """An Axis as it is, a ProcessGroup wrapped."""
    if isinstance(group_or_axis, Axis):
        return group_or_axis
    # What new_group returns on ranks outside the group may be an int; `Axis.of` refuses it with the reason.
    group: object = group_or_axis
    if isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER:
        return Axis.of(group_or_axis)
    raise ValueError(
        f"a group must be a pypar Axis (mesh.cp) or a torch.distributed ProcessGroup, not {group_or_axis!r}; "
        "for all ranks pass torch.distributed.group.WORLD"
    )
