"""Ulysses inside, a ring outside (Fang and Zhao, USP, arXiv 2405.07719): neighbours share heads, their parts travel.

A degree of a x b: a neighbours each take a share of the heads of what they hold together, and b such groups pass
keys and values round. The all-to-all is where links are fast, the ring, which hides behind attention, where not.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import all_gather_start
from pypar.context_parallel.call import Call, refuse_options
from pypar.context_parallel.methods.ulysses import attend
from pypar.mesh import Axis, as_axis


@dataclass(frozen=True, eq=False)
class HybridGroups:
    """The two axes of one rank: those that share heads with it, and those that hold the same heads."""

    ulysses: Axis
    ring: Axis

    def __repr__(self) -> str:
        return f"{self.ulysses.size} x {self.ring.size}"  # the same on every rank, whose calls are compared by it


def hybrid_groups(group: Axis | dist.ProcessGroup, ulysses_size: int) -> HybridGroups:
    """The two axes of this rank. Every rank of `group` calls it; the first call makes the process groups.

    ValueError: ulysses_size does not divide the number of ranks.
    """
    axis = as_axis(group)
    _check_size(ulysses_size, axis)
    first = axis.rank - axis.rank % ulysses_size
    inner = [first + i for i in range(ulysses_size)]
    outer = list(range(axis.rank % ulysses_size, axis.size, ulysses_size))
    made: _Pair = (None, None)
    if ulysses_size not in (1, axis.size):
        assert axis.group is not None
        known = _made.setdefault(axis.group, {})
        if ulysses_size not in known:
            _count_groups_alike(axis)
            known[ulysses_size] = (_new_group(axis, inner), _new_group(axis, outer))
        made = known[ulysses_size]
    return HybridGroups(_axis_of(axis, inner, made[0]), _axis_of(axis, outer, made[1]))


def hybrid(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A `call.Method`. Options: ulysses_size, or groups, from `hybrid_groups`.

    Without either the largest divisor of the degree that is not above the number of key/value heads.
    """
    refuse_options("hybrid", call.method_options, ("ulysses_size", "groups"))
    groups = call.method_options.get("groups")
    if groups is None:
        size = call.method_options.get("ulysses_size")
        groups = hybrid_groups(call.axis, default_size(call.axis.size, k.shape[-2]) if size is None else size)
    if groups.ulysses.size * groups.ring.size != call.axis.size:
        raise ValueError(
            f"groups of {groups} ranks do not make up axis {call.axis.name!r}, which has {call.axis.size}; make "
            "them with hybrid_groups(group, ulysses_size) of the same group"
        )
    return attend(q, k, v, call, groups.ulysses, groups.ring)


def default_size(size: int, G: int) -> int:
    return max(a for a in range(1, size + 1) if size % a == 0 and a <= max(G, 1))


_Pair = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]
# The groups that were made of a group, by ulysses_size, kept as long as it: an Axis may be made anew for each call.
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, _Pair]] = weakref.WeakKeyDictionary()


def _check_size(ulysses_size: int, axis: Axis) -> None:
    if not isinstance(ulysses_size, int) or ulysses_size < 1 or axis.size % ulysses_size:
        divisors = [a for a in range(1, axis.size + 1) if axis.size % a == 0]
        raise ValueError(
            f"ulysses_size ({ulysses_size}) must divide the size of axis {axis.name!r} ({axis.size}); use one of "
            f"{divisors}"
        )


def _count_groups_alike(axis: Axis) -> None:
    """After it, all ranks of the axis belong to equally many process groups.

    torch names a group that only its members make by its ranks and by how many groups the rank belongs to, so ranks
    with different numbers would wait for each other under different names. A rank with fewer makes groups of itself.
    """
    mine = torch.tensor([len(dist.distributed_c10d._world.pg_names)], device=_device_of(axis.group))
    counts = all_gather_start(mine, axis).wait()
    for _ in range(int(counts.max()) - int(mine)):
        _new_group(axis, [axis.rank])


def _device_of(group: dist.ProcessGroup | None) -> str:
    """Where a group's messages may lie: on CPUs if it serves them."""
    return "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"


def _new_group(axis: Axis, indices: list[int]) -> dist.ProcessGroup:
    """A group of some ranks of an axis, which these alone make."""
    ranks = [axis.ranks[i] for i in indices]
    return dist.new_group(ranks, use_local_synchronization=True, backend=dist.get_backend(axis.group))


def _axis_of(axis: Axis, indices: list[int], group: dist.ProcessGroup | None) -> Axis:
    """The axis of some ranks of another, whose bytes count for both."""
    if len(indices) == axis.size:
        return axis
    if len(indices) == 1:
        return Axis.single(axis.name)
    ranks = tuple(axis.ranks[i] for i in indices)
    return Axis(axis.name, group, indices.index(axis.rank), len(ranks), ranks, axis.traffic)
