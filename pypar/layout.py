"""Which part of a global tensor this rank holds, and how a parameter's first values follow from its name.

A parameter is a plain local tensor that carries a `Layout`. DTensors are made from it only at the boundary
(checkpoint, export, inspection), where any layout can then load any other.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from pypar.mesh import AXIS_NAMES, Axis, Mesh

_ATTRIBUTE = "_pypar_layout"


@dataclass(frozen=True)
class Layout:
    """Where the parts of a global tensor are.

    global_shape        shape of the whole tensor
    shards              (mesh axis name, tensor dim) pairs: dim is cut into as many equal parts as the axis
                        has ranks, in rank order; on other axes every rank that has it has the same
    gradient_sum_axes   axes over which each rank's gradient is only a part, to be summed before the optimizer
                        uses it (norm weights under sequence parallelism: ("tp",)); the data axis goes without
                        saying and is not listed
    """

    global_shape: tuple[int, ...]
    shards: tuple[tuple[str, int], ...] = ()
    gradient_sum_axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_shape", tuple(self.global_shape))
        for name in (*(axis_name for axis_name, _ in self.shards), *self.gradient_sum_axes):
            if name not in AXIS_NAMES:
                raise ValueError(
                    f"layout names an unknown mesh axis {name!r}; use one of {', '.join(AXIS_NAMES)}"
                )
        for axis_name, dim in self.shards:
            if not 0 <= dim < len(self.global_shape):
                raise ValueError(
                    f"layout cuts dim {dim} over {axis_name}, but the tensor's shape is {self.global_shape}; "
                    f"use a dim from 0 to {len(self.global_shape) - 1}"
                )
        names = [axis_name for axis_name, _ in self.shards]
        dims = [dim for _, dim in self.shards]
        if len(set(names)) < len(names) or len(set(dims)) < len(dims):
            raise ValueError(
                f"layout shards {self.shards} must name each mesh axis and each dim at most once"
            )


def set_layout(param: Tensor, layout: Layout) -> None:
    """Attach a layout to a parameter (its local part).

    The attribute lives on the tensor object: a module's `.to(dtype)` keeps it, but what makes a new Parameter
    (copy.deepcopy, `to_empty` of a meta module) loses it, and the layout must be set again.
    """
    sharded = {dim for _, dim in layout.shards}
    shape = tuple(param.shape)
    fits = len(shape) == len(layout.global_shape) and all(
        total % part == 0 if dim in sharded and part else total == part
        for dim, (part, total) in enumerate(zip(shape, layout.global_shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"a parameter of shape {shape} cannot be a part of {layout.global_shape} cut by {layout.shards}; "
            "the dims that are not cut must be equal and the others must divide"
        )
    setattr(param, _ATTRIBUTE, layout)


def layout_of(param: Tensor) -> Layout:
    """The layout that `set_layout` attached, or a replicated one of the tensor's own shape."""
    layout: Layout | None = getattr(param, _ATTRIBUTE, None)
    return Layout(tuple(param.shape)) if layout is None else layout


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of ``x`` as a plain tensor: the part of a `pypar.sharded.Sharded`, else the tensor itself.

    It shares memory with ``x``, and autograd leads back to it.
    """
    if type(x) in (Tensor, torch.nn.Parameter):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def local_shape(layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """The shape of this rank's part."""
    shape = list(layout.global_shape)
    for axis_name, dim in layout.shards:
        shape[dim] = _part_length(layout, axis_name, dim, mesh)
    return tuple(shape)


def local_part(global_tensor: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """This rank's part of a whole tensor: a contiguous copy, or the tensor itself where nothing is cut."""
    if tuple(global_tensor.shape) != layout.global_shape:
        raise ValueError(
            f"a tensor of shape {tuple(global_tensor.shape)} does not have the layout's global shape "
            f"{layout.global_shape}; pass the whole tensor"
        )
    part = global_tensor
    for axis_name, dim in layout.shards:
        length = _part_length(layout, axis_name, dim, mesh)
        part = part.narrow(dim, _axis(mesh, axis_name).rank * length, length)
    # A copy, so that the part does not keep the whole tensor alive.
    return part if part is global_tensor else part.clone(memory_format=torch.contiguous_format)


def to_dtensor(local: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """The whole tensor as a DTensor on `mesh.device_mesh`, sharing memory with this rank's part.

    A mesh of one rank has no device mesh: there the local tensor, which is the whole one, is returned as it
    is (torch.distributed.checkpoint stores and loads both alike). "Replicate" on pp means: the same on every
    stage that has it.
    """
    expected = local_shape(layout, mesh)
    if tuple(local.shape) != expected:
        raise ValueError(
            f"this rank's part of {layout.global_shape} cut by {layout.shards} on {mesh} has shape "
            f"{expected}, but the tensor has {tuple(local.shape)}; pass the part that `local_part` gives"
        )
    if mesh.device_mesh is None:
        return local.detach()
    placements: list[Placement] = [Replicate() for _ in AXIS_NAMES]
    for axis_name, dim in layout.shards:
        placements[AXIS_NAMES.index(axis_name)] = Shard(dim)
    shape = torch.Size(layout.global_shape)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        local.detach(), mesh.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def initial_weight(
    name: str, global_shape: tuple[int, ...], seed: int, std: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The whole first value of a parameter, from N(0, std^2), by seed, name and shape, never by the layout.

    name is the global parameter name ("layers.3.attention.q.weight"). Values are drawn in fp32 on the CPU and
    then rounded to dtype, so that dtypes agree as well.
    """
    if std < 0:
        raise ValueError(f"the standard deviation of {name} is {std}; it must be 0 or more")
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    weight = torch.empty(global_shape, dtype=torch.float32, device="cpu")
    return weight.normal_(0.0, std, generator=generator).to(dtype)


def _part_length(layout: Layout, axis_name: str, dim: int, mesh: Mesh) -> int:
    total, size = layout.global_shape[dim], _axis(mesh, axis_name).size
    if total % size:
        raise ValueError(
            f"dim {dim} ({total}) of a tensor of shape {layout.global_shape} must divide by the {axis_name} "
            f"size ({size}); use {f'{total - total % size} or ' if total > size else ''}{total + size - total % size}"
        )
    return total // size


def _axis(mesh: Mesh, axis_name: str) -> Axis:
    axis: Axis = getattr(mesh, axis_name)
    return axis
