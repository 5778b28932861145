"""Random first values: the whole tensor's are drawn, this rank's part of them is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pypar.layout import local_tensor
from pypar.sharded.tensor import Sharded, Sharding

_IN_PLACE = "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_ kaiming_uniform_ constant_"
_NEW = "rand_like randn_like randint_like"


def _whole_like(x: Tensor, sharding: Sharding) -> Tensor:
    part = local_tensor(x)
    return torch.empty(sharding.shape, dtype=part.dtype, device=part.device)


@torch.no_grad()
def _fill(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """x.normal_(...), nn.init.kaiming_uniform_(x, ...): what they give the whole tensor.

    Needs the whole tensor's memory for the moment. Generators must be in the same state on every rank of the axis.
    """
    x: Sharded = args[0] if args else kwargs["tensor"]
    rest = dict(kwargs) if args else {key: value for key, value in kwargs.items() if key != "tensor"}
    if any(isinstance(value, Tensor) for value in (*args[1:], *rest.values())):
        raise ValueError(
            f"{name} of {x._pypar_sharding} takes numbers, not tensors; draw the whole tensor and x.copy_(it)"
        )
    if not local_tensor(x).is_meta:
        whole = _whole_like(x, x._pypar_sharding)
        if getattr(func, "__module__", None) == "torch.nn.init":
            func(whole, *args[1:], **rest)
        else:
            getattr(whole, name)(*args[1:], **rest)
        local_tensor(x).copy_(x._pypar_sharding.part(whole))
    return x


def _draw(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Sharded:
    """torch.randn_like(x) and its like."""
    x: Sharded = args[0]
    whole = func(_whole_like(x, x._pypar_sharding), *args[1:], **kwargs)
    return x.part_of(whole)


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_IN_PLACE.split(), _fill),
    **dict.fromkeys(_NEW.split(), _draw),
}
