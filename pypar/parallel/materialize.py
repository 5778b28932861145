"""Memory and values for a model of the meta device: of each parameter only what this rank has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pypar.blocks import global_parameters
from pypar.layout import layout_of, local_tensor, set_layout
from pypar.sharded import Sharded, shard
from pypar.sharded.partial import sum_in_backward, summed_in_backward

Values = Callable[
    [str, tuple[int, ...]], Tensor
]  # (name in the whole model, whole shape) -> the whole tensor


@torch.no_grad()
def materialize(model: nn.Module, values: Values, *, device: torch.device | str = "cpu") -> nn.Module:
    """Put a model from the meta device onto ``device``, in place; returns the model.

    values: gives the whole tensor of a parameter by its name in the whole model and its shape; a rank asks for what it
    has a part of, one after another, keeps its part and lets the rest go. It is rounded to the parameter's dtype.

    ValueError: a value of another shape; a buffer on the meta device, which `values` does not give.
    """
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(
                f"buffer {name} is on the meta device, and only parameters get values here; make the model with its "
                "buffers on a real device"
            )
    made: dict[int, nn.Parameter] = {}
    for name, parameter in global_parameters(model):
        whole = values(name, layout_of(parameter).global_shape)
        if tuple(whole.shape) != layout_of(parameter).global_shape:
            raise ValueError(
                f"{name} has the shape {layout_of(parameter).global_shape} in the model, and a value of shape "
                f"{tuple(whole.shape)}; give the whole tensor"
            )
        made[id(parameter)] = _filled(parameter, whole, torch.device(device))
    for module in model.modules():
        for own, old in list(module._parameters.items()):
            if old is not None:
                setattr(module, own, made[id(old)])
    return model


def _filled(parameter: nn.Parameter, whole: Tensor, device: torch.device) -> nn.Parameter:
    layout, needs_grad = layout_of(parameter), parameter.requires_grad
    if isinstance(parameter, Sharded):
        sharding = parameter._pypar_sharding
        part = sharding.part(whole).to(device, parameter.dtype, copy=True)
        return shard(part.contiguous(), layout, sharding.axis, sharding.name, needs_grad)
    filled = nn.Parameter(whole.to(device, parameter.dtype, copy=True).contiguous(), needs_grad)
    set_layout(filled, layout)
    if (axis := summed_in_backward(parameter)) is not None:
        sum_in_backward(filled, axis)
    return filled


@torch.no_grad()
def fill(model: nn.Module, values: Values) -> None:
    """Give the parameters of a model, which may be spread, new values in place: as `materialize` asks for them."""
    for name, parameter in global_parameters(model):
        whole = values(name, layout_of(parameter).global_shape)
        part = parameter._pypar_sharding.part(whole) if isinstance(parameter, Sharded) else whole
        local_tensor(parameter).copy_(part)
