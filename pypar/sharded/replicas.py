"""Whether ranks hold the same parts, which data parallelism takes for granted."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pypar.comm.identical import first_difference
from pypar.layout import local_tensor
from pypar.mesh import Axis
from pypar.sharded.tensor import Sharded

_INSTALLED = "pypar_looks_first"


def named_parts(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """This rank's plain tensors, by names that also say which part of a cut tensor each is."""
    return [
        (f"{name}, part {x._pypar_sharding.axis.rank} of {x._pypar_sharding.shape}", local_tensor(x))
        if isinstance(x, Sharded)
        else (name, x)
        for name, x in named
    ]


def refuse_different_parts(what: str, named: Iterable[tuple[str, Tensor]], axis: Axis) -> None:
    """ValueError where ranks of the axis hold different parts of a tensor. Nothing is sent."""
    for name, x in named:
        if isinstance(x, Sharded) and len(set(axis.ranks) & set(x._pypar_sharding.axis.ranks)) > 1:
            raise ValueError(
                f"{what} over the ranks {list(axis.ranks)} would take different parts of {name} for copies of one: it "
                f"is {x._pypar_sharding.described}, ranks {list(x._pypar_sharding.axis.ranks)}; give it the group of "
                "ranks that hold the same part, mesh.data or mesh.dp.group"
            )


def watch_distributed_data_parallel() -> None:
    """torch's DistributedDataParallel is refused where its ranks hold different parts.

    It has no hook for that, so its constructor is wrapped, once in a process.
    """
    ddp = nn.parallel.DistributedDataParallel
    original = ddp.__init__
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def init(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, nn.Module) and any(isinstance(p, Sharded) for p in module.parameters()):
            group = next((x for x in (*args, *kwargs.values()) if isinstance(x, dist.ProcessGroup)), None)
            device_mesh = kwargs.get("device_mesh")
            if group is None and device_mesh is not None:
                group = device_mesh.get_group(mesh_dim=0)
            axis = Axis.of(group or dist.group.WORLD)  # type: ignore[arg-type]
            named = list(module.named_parameters())
            difference = first_difference(named_parts(named), axis, values=False)
            if difference is not None:
                refuse_different_parts("DistributedDataParallel", named, axis)
                raise ValueError(
                    f"the ranks {list(axis.ranks)} of DistributedDataParallel hold different models or parts of one: "
                    f"{difference} of parameters differs; give it mesh.dp.group"
                )
        original(self, module, *args, **kwargs)

    setattr(init, _INSTALLED, True)
    ddp.__init__ = init  # type: ignore[method-assign]
