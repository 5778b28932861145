"""A tensor that is cut over an axis: it holds this rank's part and answers for the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from pypar.comm import gather_replicated
from pypar.layout import Layout, local_tensor
from pypar.mesh import Axis


@dataclass(frozen=True, eq=False)
class Cut:
    """How a tensor is cut: one dim into equal parts, in rank order, over one axis."""

    layout: Layout
    axis: Axis
    name: str  # for messages; "" where it has none

    @property
    def dim(self) -> int:
        return self.layout.shards[0][1]

    @property
    def shape(self) -> torch.Size:
        """The whole tensor's."""
        return torch.Size(self.layout.global_shape)

    @property
    def local_length(self) -> int:
        return self.shape[self.dim] // self.axis.size

    def fits(self, other: Cut) -> bool:
        """Whether tensors cut in these two ways have the same elements on every rank."""
        return self is other or (
            self.shape == other.shape and self.dim == other.dim and self.axis.ranks == other.axis.ranks
        )

    def part(self, whole: Tensor) -> Tensor:
        """This rank's slice, a view, of what has the whole tensor's shape or is broadcast to it."""
        dim = self.dim - len(self.shape)
        if whole.dim() < -dim or whole.shape[dim] == 1:
            return whole
        return whole.narrow(dim, self.axis.rank * self.local_length, self.local_length)

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else "a tensor "
        return f"{name}{tuple(self.shape)}, cut along dim {self.dim} over axis {self.axis.name!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
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

    _pypar_cut: Cut

    @property
    def _pypar_layout(self) -> Layout:
        """What `pypar.layout.layout_of` reads."""
        return self._pypar_cut.layout

    def local(self) -> Tensor:
        """This rank's part as a plain tensor, sharing memory; autograd leads back to this one."""
        return local_tensor(self)

    def full_tensor(self) -> Tensor:
        """The whole tensor, which all ranks use alike where it has a gradient.

        A collective: every rank of the axis calls it.
        """
        return gather_replicated(self.local(), self._pypar_cut.axis, self._pypar_cut.dim)

    def to_dtensor(self) -> DTensor:
        """The same as a DTensor over the axis's ranks, sharing memory, without a graph."""
        cut = self._pypar_cut
        mesh = cut.axis.device_mesh(local_tensor(self).device.type)
        strides = torch.empty(cut.shape, device="meta").stride()
        return DTensor.from_local(
            local_tensor(self).detach(),
            mesh,
            [Shard(cut.dim)],
            run_check=False,
            shape=cut.shape,
            stride=strides,
        )

    def part_of(self, other: Tensor) -> Sharded:
        """``other``, whole or a DTensor, as a tensor that is cut as this one is: a copy where it is whole."""
        from pypar.sharded.elementwise import operand

        if isinstance(other, Sharded) or other.shape != self._pypar_cut.shape:
            return operand(other, self._pypar_cut, "part_of")  # as it is, or an error
        with torch._C.DisableTorchFunctionSubclass():
            part = operand(other.detach(), self._pypar_cut, "part_of")
            if not isinstance(other, DTensor):  # a slice would keep the whole alive
                part = part.clone(memory_format=torch.contiguous_format)
            return wrap(part, self._pypar_cut)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operations.run(func, args, kwargs or {})

    # torch.distributed.checkpoint asks tensors for these (torch.distributed._checkpointable): each rank writes and
    # reads its own part of the whole.

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return self.to_dtensor().__create_write_items__(fqn, self.to_dtensor())  # type: ignore[attr-defined]

    def __create_chunk_list__(self) -> list[Any]:
        return self.to_dtensor().__create_chunk_list__()  # type: ignore[attr-defined]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return local_tensor(self).detach()


def wrap(part: Tensor, cut: Cut) -> Sharded:
    """The tensor of which ``part`` is this rank's, in the same memory and autograd graph."""
    with torch._C.DisableTorchFunctionSubclass():
        made = part.as_subclass(Sharded) if part.requires_grad else Tensor._make_subclass(Sharded, part)
    made._pypar_cut = cut
    return made


def shard(
    part: Tensor, layout: Layout, axis: Axis, name: str = "", requires_grad: bool = True
) -> nn.Parameter:
    """A parameter of which ``part`` is this rank's: `Sharded` where the layout cuts it, else a plain nn.Parameter."""
    part = local_tensor(part).detach()
    if not layout.shards or axis.size == 1:
        return nn.Parameter(part, requires_grad=requires_grad)
    made = wrap(part, Cut(layout, axis, name))
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
