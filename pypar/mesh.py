"""Names for the axes of parallelism, and the process group behind each.

Ranks are laid out with pp outermost, then dp, cp, and tp innermost, so that the ranks of one tensor-parallel
group are neighbours (one node) and the stages of a pipeline are far apart:

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pypar.comm.traffic import Traffic

AXIS_NAMES = ("pp", "dp", "cp", "tp")  # outermost first


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a mesh as this rank sees it.

    group is None exactly where size is 1; rank is this rank's index on the axis; ranks are the global ranks
    on it, in order. A copy of a module shares its axes (copying, shallow or deep, returns the same object).
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    size: int
    ranks: tuple[int, ...]
    traffic: Traffic

    @classmethod
    def single(cls, name: str) -> Axis:
        """An axis of one rank, which needs no process group."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return cls(name, None, 0, 1, (rank,), Traffic(name))

    @classmethod
    def of(cls, group: dist.ProcessGroup, name: str = "group") -> Axis:
        """An axis over the ranks of a process group that this rank belongs to."""
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"rank {dist.get_rank()} is not in the process group that axis {name!r} was to wrap; "
                "make the axis on the group's own ranks only"
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return cls.single(name)
        return cls(name, group, group.rank(), len(ranks), ranks, Traffic(name))

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


class Mesh:
    """All ranks of the job as a grid of pp x dp x cp x tp.

    Every rank makes the same meshes in the same order, after init_process_group (a mesh of one rank needs
    none).

    pp, dp, cp, tp  the axes
    data            dp and cp as one axis: gradients are summed over it
    world           all ranks as one axis
    sizes           {"pp": .., "dp": .., "cp": .., "tp": ..}
    device_mesh     the same grid as a torch DeviceMesh, None where the mesh has one rank

    device_type is "cpu" or "cuda"; by default what the default process group's backend serves.
    """

    def __init__(
        self,
        dp: int = 1,
        pp: int = 1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        *,
        device_type: str | None = None,
    ) -> None:
        self.sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
        for name, size in {**self.sizes, "ep": ep}.items():
            _check_size(name, size)
        num_ranks = math.prod(self.sizes.values())
        if dist.is_available() and dist.is_initialized():
            check_mesh(self.sizes, dist.get_world_size())
        elif num_ranks > 1:
            raise ValueError(
                f"mesh {format_mesh(self.sizes)} needs {num_ranks} ranks but torch.distributed is not "
                "initialised; call torch.distributed.init_process_group first, under torchrun"
            )
        self.device_mesh: DeviceMesh | None = None
        if num_ranks == 1:
            self.pp, self.dp, self.cp, self.tp, self.data, self.world = map(
                Axis.single, (*AXIS_NAMES, "data", "world")
            )
            return
        shape = tuple(self.sizes.values())
        self.device_mesh = init_device_mesh(device_type or _device_type(), shape, mesh_dim_names=AXIS_NAMES)
        self.pp, self.dp, self.cp, self.tp = map(self._axis, AXIS_NAMES)
        self.data = self._data_axis()
        assert dist.group.WORLD is not None
        self.world = Axis.of(dist.group.WORLD, "world")

    def _axis(self, name: str) -> Axis:
        assert self.device_mesh is not None
        if self.sizes[name] == 1:
            return Axis.single(name)
        return Axis.of(self.device_mesh.get_group(name), name)

    def _data_axis(self) -> Axis:
        """dp and cp flattened, dp outermost. Shares the group of dp or cp where the other has size 1."""
        pp, dp, cp, tp = self.sizes.values()
        if cp == 1 or dp == 1:
            axis = self.dp if cp == 1 else self.cp
            return Axis("data", axis.group, axis.rank, axis.size, axis.ranks, Traffic("data"))
        grid = torch.arange(pp * dp * cp * tp).view(pp, dp * cp, tp).movedim(1, 2).reshape(-1, dp * cp)
        group, _ = dist.new_subgroups_by_enumeration(grid.tolist())
        return Axis.of(group, "data")

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self.sizes.items())})"


def parse_mesh(text: str) -> dict[str, int]:
    """Read "tp=2,pp=2" into the sizes of all four axes; those not named are 1.

    Raises ValueError on an unknown or repeated axis and on a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in (*AXIS_NAMES, "ep"):
            close = difflib.get_close_matches(name, AXIS_NAMES, n=1, cutoff=0.5)
            remedy = f"did you mean {close[0]!r}" if close else f"use some of {', '.join(AXIS_NAMES)}"
            raise ValueError(f"mesh {text!r} names an unknown axis {name!r}; {remedy}, as in tp=2,pp=2")
        if name in sizes:
            raise ValueError(f"mesh {text!r} gives axis {name} twice; give each axis once")
        if not equals or not value.isdecimal():
            raise ValueError(
                f"mesh {text!r} must give axis {name} a positive whole number, not {value!r}; write {name}=2"
            )
        sizes[name] = int(value)
        _check_size(name, sizes[name])
    return {name: sizes.get(name, 1) for name in AXIS_NAMES}


def format_mesh(sizes: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads, axes of size 1 left out: "tp=2,pp=2"; "tp=1" for one rank."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "tp=1"


def check_mesh(sizes: Mapping[str, int], world_size: int) -> None:
    """Raise ValueError unless the sizes are positive and multiply to world_size."""
    for name, size in sizes.items():
        _check_size(name, size)
    num_ranks = math.prod(sizes.values())
    if num_ranks != world_size:
        were = "was" if world_size == 1 else "were"
        raise ValueError(
            f"mesh {format_mesh(sizes)} needs {num_ranks} rank{'s' * (num_ranks > 1)} but {world_size} "
            f"{were} started; start {num_ranks} (torchrun --nproc-per-node {num_ranks}) or use a mesh whose "
            f"sizes multiply to {world_size}"
        )


def _check_size(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"mesh axis {name}={size!r} must be a positive whole number; use {name}=1 to leave the axis out"
        )
    if name == "ep" and size > 1:
        raise ValueError(f"ep={size} asks for expert parallelism, which pypar does not have yet; use ep=1")


def _device_type() -> str:
    """The device type that the default process group serves: "cuda" with NCCL and a GPU, else "cpu"."""
    return "cuda" if "nccl" in dist.get_backend_config() and torch.cuda.is_available() else "cpu"
