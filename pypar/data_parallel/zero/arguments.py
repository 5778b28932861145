"""What a sharded store can be made of, and how."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pypar.comm.identical import first_difference
from pypar.data_parallel.arrivals import Hook
from pypar.mesh import Axis, Mesh
from pypar.sharded import named_parts

ACCUMULATE = ("local", "reduce")
OFFLOAD = ("none", "chunks")


def check_options(  # noqa: PLR0913 - one argument an option
    *,
    stage: int,
    shard_size: int,
    reshard: bool | int,
    dtype: torch.dtype | None,
    accumulate: str,
    bucket_bytes: int,
    num_samples: int,
) -> None:
    """ValueError for a value that an option does not have. num_samples: the ranks of the axis that is cut."""
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(
            f"stage ({stage!r}) must be 0 (all whole), 1 (optimizer states are cut over ranks), 2 (gradients too) or 3 "
            "(parameters too)"
        )
    if type(shard_size) is not int or shard_size < 0 or (shard_size and num_samples % shard_size):
        raise ValueError(
            f"shard_size ({shard_size!r}) must divide dp ({num_samples}): the ranks of dp over which states are cut; "
            "0: all of them"
        )
    if type(reshard) not in (bool, int) or (reshard is not True and reshard is not False and reshard < 1):
        raise ValueError(
            f"reshard ({reshard!r}) must be True (free a block after its forward), False (keep it until its backward "
            "is over), or a number of ranks, at least 1, over which it stays cut in between"
        )
    shard = shard_size or num_samples
    if type(reshard) is int and shard % reshard:
        raise ValueError(
            f"reshard ({reshard}) must divide the ranks of dp over which parameters are cut ({shard}); use True to cut "
            "a block again over all of them"
        )
    if reshard is not True and stage != 3:
        raise ValueError(
            f"reshard={reshard!r} is about parameters that are cut over ranks, and with stage={stage} they are whole; "
            "leave it out, or use stage=3"
        )
    if accumulate not in ACCUMULATE:
        raise ValueError(
            f'accumulate ({accumulate!r}) must be "local" (microbatches\' gradients are added up whole and reduced '
            'once) or "reduce" (each microbatch is reduced into this rank\'s rows)'
        )
    if accumulate == "reduce" and stage < 2:
        raise ValueError(
            f'accumulate="reduce" is for gradients that are cut over ranks, and with stage={stage} they are whole; use '
            'accumulate="local", or stage=2 or 3'
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype ({dtype}) must be a floating-point one, such as torch.bfloat16, or None for that of each parameter"
        )
    if type(bucket_bytes) is not int or bucket_bytes < 1:
        raise ValueError(f"bucket_bytes ({bucket_bytes!r}) must be positive; 25 << 20 is 25 MiB")


def check_offload(offload: str, device_bytes: int | None) -> None:
    """ValueError for a place of states that there is not, and a budget that does not go with it."""
    if offload not in OFFLOAD:
        raise ValueError(
            f'offload ({offload!r}) must be "none" (states stay on the device) or "chunks" (they move between the '
            "device and the host, within device_bytes)"
        )
    if (offload == "chunks") != (device_bytes is not None):
        raise ValueError(
            f"device_bytes ({device_bytes}) is what the store may take of the device with offload={'chunks'!r}, and "
            f"offload is {offload!r}; give both, or neither"
        )
    if device_bytes is not None and (type(device_bytes) is not int or device_bytes < 1):
        raise ValueError(
            f"device_bytes ({device_bytes!r}) must be a positive number of bytes; 2 << 30 is 2 GiB"
        )


def check_mesh(mesh: Mesh) -> None:
    """ValueError for what is no mesh."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"zero() takes a pypar.Mesh, whose data axes tell who holds the same model, not a {type(mesh).__name__}; "
            "make one, Mesh(dp=torch.distributed.get_world_size())"
        )


def check_model(model: nn.Module) -> None:
    """ValueError for a model that is not a plain one, or has parameters without values."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"zero() takes a torch.nn.Module, not a {type(model).__name__}; pass the model itself"
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            where = f"its part {name!r}" if name else "the model"
            raise ValueError(
                f"{where} is a {kind} already, and gradients would be reduced twice; pass the plain model"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet; run one forward pass before")
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device, without values; give the model values first, the same on "
                "every rank (model.to_empty(device=...) and its initialisation, or pypar.parallel.materialize)"
            )
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"parameter {name!r} is a DTensor, and what shards it (fully_shard, parallelize_module) reduces its "
                "gradient; pass the plain model"
            )
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, Hook) and hook.is_alive for hook in hooks.values()):
            raise ValueError(
                f"parameter {name!r} has gradient buckets or a store already, and its gradient would be reduced twice; "
                "close() them first"
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name!r} of {parameter.dtype} is trained, and gradients are summed in floating point; "
                "freeze it"
            )


def check_alike(named: Iterable[tuple[str, nn.Parameter]], axis: Axis, options: str) -> None:
    """ValueError, on all ranks of the axis, where they do not hold the same parameters or have other options."""
    flags = [(f"{name}, {'trained' if p.requires_grad else 'frozen'}", p) for name, p in named]
    if first_difference([(options, torch.empty(0))], axis) is not None:
        raise ValueError(
            f"the ranks of axis {axis.name!r} do not ask for the same store; this one asks for {options}; call zero() "
            "with the same arguments on every rank"
        )
    difference = first_difference(named_parts(flags), axis)
    if difference is not None:
        raise ValueError(
            f"the parameters are not the same on all {axis.size} ranks of axis {axis.name!r}: {difference}; start "
            "every rank from one seed or one checkpoint"
        )
