"""A tensor that is cut over an axis: it holds this rank's part and answers for the whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from pypar.comm import gather_replicated
from pypar.grid import SimulatedRank
from pypar.layout import Cut, Layout, assemble, local_shape, local_slice, local_tensor
from pypar.mesh import Axis
from pypar.sharded import checkpointable


@dataclass(frozen=True, eq=False)
class Sharding:
    """How a tensor is cut over an axis: by a layout whose axes are all those of the axis.

    ValueError where the layout names others, or leaves some out: their ranks would hold the same part.
    """

    layout: Layout
    axis: Axis
    name: str  # for messages; "" where it has none

    def __post_init__(self) -> None:
        if set(self.layout.axes) != set(self.axis.names):
            raise ValueError(
                f"a {self.layout} is not cut over all of axis {self.axis.name!r} ({', '.join(self.axis.names)}) and no "
                "other; give the axis that is the product of the layout's axes, mesh.axis(...)"
            )

    @property
    def shape(self) -> torch.Size:
        """The whole tensor's."""
        return torch.Size(self.layout.global_shape)

    @functools.cached_property
    def even_dim(self) -> int | None:
        """The dim that is cut into equal parts, in rank order, one for each rank; None where it is not as simple."""
        (cut, *more), owner = self.layout.cuts or (Cut(0, ()),), self.layout.owner
        simple = not more and owner is None and not cut.blocks and cut.axes == self.axis.names
        return cut.dim if simple and self.shape[cut.dim] % self.axis.size == 0 else None

    def fits(self, other: Sharding) -> bool:
        """Whether tensors cut in these two ways have the same elements on every rank."""
        return self is other or (
            self.axis.ranks == other.axis.ranks
            and (self.layout.global_shape, self.layout.cuts, self.layout.owner)
            == (other.layout.global_shape, other.layout.cuts, other.layout.owner)
        )

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of what has the whole tensor's shape or is broadcast to it: a view where it is one piece."""
        return local_slice(whole, self.layout, self.axis)

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor from the ranks' parts, which all ranks use alike where it has a gradient. A collective."""
        axis, layout = self.axis, self.layout
        if self.even_dim is not None:
            return gather_replicated(part, axis, self.even_dim)
        shapes = [local_shape(layout, SimulatedRank(axis.grid, rank)) for rank in range(axis.size)]
        longest = max(map(math.prod, shapes))
        # Each rank sends as many elements as the largest part has; where each element of the whole is in what arrives:
        received = gather_replicated(functional.pad(part.reshape(-1), (0, longest - part.numel())), axis, 0)
        places = [
            rank * longest + torch.arange(math.prod(shape)).view(shape) for rank, shape in enumerate(shapes)
        ]
        return received[assemble(places, layout, axis.grid).to(part.device)]

    @property
    def described(self) -> str:
        """The whole shape, and how it is cut."""
        dims = list(dict.fromkeys(cut.dim for cut in self.layout.cuts))
        along = f"cut along dim {' and '.join(map(str, dims))} over" if dims else "owned by a rank of"
        return f"{tuple(self.shape)}, {along} axis {self.axis.name!r}"

    def __str__(self) -> str:
        return f"{self.name or 'a tensor'} {self.described}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self


class Sharded(Tensor):
    """A tensor, most often a parameter or its gradient, of which this rank holds a part.

        x.shape, x.numel()      those of the whole tensor
        x.local()               this rank's part, a plain tensor that shares memory with it
        x.full_tensor()         the whole tensor; every rank of the axis calls it
        x.grad                  is cut alike

    Elementwise operations, in place or not, act on the parts; a plain tensor beside it has the shape of the whole,
    or is broadcast to it. Reductions to one number (sum, norm, max, all, ...) give the whole tensor's value and
    communicate: every rank of the axis calls them, in one order. Filling it with random numbers draws the whole
    tensor's and keeps this rank's part; generators must be in the same state on all ranks. Whatever would mix parts
    (products of matrices, sums along a dim, indexing, reshaping, ...) raises ValueError. It is made by `shard`.
    """

    _pypar_sharding: Sharding

    @property
    def _pypar_layout(self) -> Layout:
        """What `pypar.layout.layout_of` reads."""
        return self._pypar_sharding.layout

    def local(self) -> Tensor:
        """This rank's part as a plain tensor, sharing memory; autograd leads back to this one."""
        return local_tensor(self)

    def full_tensor(self) -> Tensor:
        """The whole tensor, which all ranks use alike where it has a gradient.

        A collective: every rank of the axis calls it.
        """
        return self._pypar_sharding.whole(self.local())

    def for_state_dict(self) -> Tensor:
        """What a state_dict has for the parameter: it shares memory and has no graph.

        A DTensor over the axis's ranks, which every user of state_dicts knows; where a DTensor cannot be cut so, a
        `Sharded`, which torch.distributed.checkpoint takes as well.
        """
        sharding, part = self._pypar_sharding, local_tensor(self).detach()
        if sharding.even_dim is None:
            return wrap(part, sharding)
        mesh = sharding.axis.device_mesh(part.device.type)
        strides = torch.empty(sharding.shape, device="meta").stride()
        placements = [Shard(sharding.even_dim)]
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=sharding.shape, stride=strides
        )

    def part_of(self, other: Tensor) -> Sharded:
        """``other``, whole or a DTensor, as a tensor that is cut as this one is: a copy where it is whole."""
        from pypar.sharded.elementwise import operand

        if isinstance(other, Sharded) or other.shape != self._pypar_sharding.shape:
            return operand(other, self._pypar_sharding, "part_of")  # as it is, or an error
        with torch._C.DisableTorchFunctionSubclass():
            part = operand(other.detach(), self._pypar_sharding, "part_of")
            if not isinstance(other, DTensor):  # a slice would keep the whole alive
                part = part.clone(memory_format=torch.contiguous_format)
            return wrap(part, self._pypar_sharding)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operations.run(func, args, kwargs or {})

    # torch.distributed.checkpoint asks tensors for these (torch.distributed._checkpointable): each rank writes and
    # reads its own part of the whole.

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        sharding = self._pypar_sharding
        return checkpointable.write_items(fqn, local_tensor(self).detach(), sharding.layout, sharding.axis)

    def __create_chunk_list__(self) -> list[Any]:
        return checkpointable.chunk_list(self._pypar_sharding.layout, self._pypar_sharding.axis)

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        sharding, part = self._pypar_sharding, local_tensor(self).detach()
        return checkpointable.tensor_at(part, sharding.layout, sharding.axis, index.offset)


def wrap(part: Tensor, sharding: Sharding) -> Sharded:
    """The tensor of which ``part`` is this rank's, in the same memory and autograd graph."""
    with torch._C.DisableTorchFunctionSubclass():
        made = part.as_subclass(Sharded) if part.requires_grad else Tensor._make_subclass(Sharded, part)
    made._pypar_sharding = sharding
    return made


def shard(
    part: Tensor, layout: Layout, axis: Axis, name: str = "", requires_grad: bool = True
) -> nn.Parameter:
    """A parameter of which ``part`` is this rank's: `Sharded` where the layout cuts it, else a plain nn.Parameter."""
    part = local_tensor(part).detach()
    if not layout.axes or axis.size == 1:
        return nn.Parameter(part, requires_grad=requires_grad)
    made = wrap(part, Sharding(layout, axis, name))
    made.requires_grad_(requires_grad)
    made._is_param = True  # what isinstance(x, nn.Parameter) looks for
    return made  # type: ignore[return-value]


def support_foreach() -> None:
    """Let torch's optimizers and clipping take their faster path, as DTensor does for itself."""
    from torch.optim.optimizer import _foreach_supported_types as of_optimizers
    from torch.utils._foreach_utils import _foreach_supported_types as of_clipping

    for supported in (of_optimizers, of_clipping):
        if Sharded not in supported:
            supported.append(Sharded)


from pypar.sharded import operations  # noqa: E402 (which needs the class)
