"""What layers cut over tp share: checks of sizes, first values that no layout changes, layouts that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pypar.comm import Handle, all_reduce_start, copy_to, reduce_scatter_start
from pypar.grid import DATA
from pypar.layout import Layout, local_slice, local_tensor, set_layout
from pypar.mesh import Axis
from pypar.ops.uncompiled import uncompiled
from pypar.sharded import Sharded, shard

Self = TypeVar("Self", bound="ShardedModule")


def part_length(what: str, total: int, axis: Axis) -> int:
    """total / axis.size; ValueError where it does not divide."""
    if total % axis.size:
        below, above = total - total % axis.size, total + -total % axis.size
        raise ValueError(
            f"{what} ({total}) must divide by the tp size ({axis.size}); use "
            f"{f'{below} or ' if below else ''}{above}"
        )
    return total // axis.size


def check_sequence(what: str, x: Tensor) -> None:
    """Sequence parallelism cuts dim 1 of [B, T, ...]."""
    if x.dim() < 3:
        raise ValueError(
            f"{what} with sequence_parallel=True cuts dim 1 of [B, T, D], but its input has shape "
            f"{tuple(x.shape)}; pass x.unsqueeze(0) for a single sequence"
        )


def sum_start(x: Tensor, axis: Axis, sequence_parallel: bool) -> Handle:
    """Start summing the ranks' x [B, T, ...]; with sequence parallelism each gets its part of dim 1. May write x."""
    return reduce_scatter_start(x, axis, 1) if sequence_parallel else all_reduce_start(x, axis)


def autocast(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that an enclosing torch.autocast asks of linear layers."""
    device_type = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in tensors)


@torch.no_grad()
def fill(
    parameter: Tensor,
    layout: Layout,
    axis: Axis,
    generator: torch.Generator | None,
    draw: Callable[[Tensor, torch.Generator | None], object],
) -> None:
    """Give a parameter its part of the whole tensor that ``draw`` fills, in fp32, on the generator's device.

    Every layout draws the whole tensor, so all agree wherever their generators are in the same state.
    """
    if parameter.is_meta:
        return
    device = "cpu" if generator is None else generator.device
    whole = torch.empty(layout.global_shape, dtype=torch.float32, device=device)
    draw(whole, generator)
    local_tensor(parameter).copy_(local_slice(whole, layout, axis))


class ShardedModule(nn.Module):
    """A module whose parameters are cut over an axis: `pypar.sharded.Sharded`, where it has more than one rank.

    A state_dict has DTensors for them, and takes DTensors or whole tensors. The layouts of parameters that are not cut
    are attached again wherever torch makes new Parameter objects: to_empty, copy.deepcopy.
    """

    axis: Axis
    sum_over: tuple[str, ...] = DATA  # over which the gradients of its parameters are summed

    def run(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        raise NotImplementedError

    def forward(self, *given: Any) -> Tensor:
        return self.run(*given) if self.axis.size == 1 else self._run_between_ranks(*given)

    @uncompiled("a layer that is cut over ranks communicates between ranks; compile without fullgraph=True")
    def _run_between_ranks(self, *given: Any) -> Tensor:
        return self.run(*given)

    def layouts(self) -> dict[str, Layout]:
        """Layout of each own parameter, by its name."""
        raise NotImplementedError

    def set_layouts(self) -> None:
        """Make the module's parameters, which hold this rank's parts, what the layouts say."""
        for name, layout in self.layouts().items():
            parameter: Tensor | None = self._parameters.get(name)  # not one that a parametrization computes
            if parameter is None or isinstance(parameter, Sharded):
                continue
            if layout.axes and self.axis.size > 1:
                label = f"{name} of {type(self).__name__}"
                setattr(self, name, shard(parameter, layout, self.axis, label, parameter.requires_grad))
            else:
                set_layout(parameter, layout)

    def sum_also_over(self, *axes: str) -> None:
        """The gradients are summed over these axes too: copies of a parameter are tied to it (pypar.layout)."""
        self.sum_over = (*self.sum_over, *axes)
        for name, layout in self.layouts().items():
            parameter = getattr(self, name)
            if isinstance(parameter, Sharded):
                parameter._pypar_sharding = replace(parameter._pypar_sharding, layout=layout)
            else:
                set_layout(parameter, layout)

    @uncompiled("it takes this rank's part of a parameter; compile without fullgraph=True")
    def part(self, name: str) -> Tensor | None:
        """This rank's part of an own parameter as a plain tensor, whatever stands in its place.

        ValueError: a plain tensor that is not the whole (from torch.func.functional_call, or a parametrization).
        """
        tensor: Tensor | None = getattr(self, name)
        if tensor is None or isinstance(tensor, Sharded) or self.axis.size == 1:
            return tensor if tensor is None else local_tensor(tensor)
        layout = self.layouts()[name]
        if tuple(tensor.shape) != layout.global_shape:
            raise ValueError(
                f"{name} of {type(self).__name__} was replaced by a plain tensor {tuple(tensor.shape)}; give the whole "
                f"{layout.global_shape}, or a tensor made from the parameter that was there"
            )
        if not layout.axes:
            return tensor
        whole = (
            copy_to(tensor, self.axis) if tensor.requires_grad else tensor
        )  # sums the parts of its gradient
        return local_slice(whole, layout, self.axis)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):  # else torch copies, which takes the part
            own: dict[str, Any] = dict(self._parameters)
            for name, parameter in own.items():
                given = state_dict.get(prefix + name)
                if isinstance(parameter, Sharded) and given is not None and given.shape == parameter.shape:
                    state_dict[prefix + name] = parameter.part_of(given)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)  # type: ignore[arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        if not keep_vars:
            for name in self._parameters:
                tensor = destination.get(prefix + name)
                if isinstance(tensor, Sharded):
                    destination[prefix + name] = tensor.for_state_dict()

    def _apply(self: Self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self.set_layouts()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.set_layouts()


class ShardedLinear(ShardedModule):
    """Weight and bias of a cut linear layer, with the initial values of the whole `nn.Linear`."""

    in_features: int
    out_features: int
    sequence_parallel: bool
    weight: nn.Parameter
    bias: nn.Parameter | None

    def allocate(self, shape: tuple[int, int], num_biases: int, options: dict[str, Any]) -> None:
        self.weight = nn.Parameter(torch.empty(shape, **options))
        if num_biases:
            self.bias = nn.Parameter(torch.empty(num_biases, **options))
        else:
            self.register_parameter("bias", None)
        self.set_layouts()
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the values that `nn.Linear` draws for the whole layer and keep this rank's part.

        ``generator`` (by default torch's global CPU one) must be in the same state on every rank of the axis.
        """
        in_features = self.layouts()["weight"].global_shape[1]
        bound = in_features**-0.5 if in_features else 0.0

        def draw(whole: Tensor, generator: torch.Generator | None) -> None:
            whole.uniform_(-bound, bound, generator=generator)

        for name, layout in self.layouts().items():
            fill(getattr(self, name), layout, self.axis, generator, draw)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, tp={self.axis.size}, "
            f"bias={self.bias is not None}, sequence_parallel={self.sequence_parallel}"
        )
