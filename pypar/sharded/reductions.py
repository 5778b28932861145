"""Reductions to one number: each rank reduces its part, then all of the axis agree on the whole's value.

The ranks' numbers are gathered and reduced in rank order, so that every rank gets the same bits and a NaN of any rank
reaches all. Where the result has a gradient the ranks' numbers are summed by `pypar.comm.reduce_from`, whose backward
hands each rank the gradient of its own part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import all_gather_start, all_reduce_start, reduce_from
from pypar.layout import local_tensor
from pypar.mesh import Axis
from pypar.sharded import elementwise
from pypar.sharded.elementwise import operand
from pypar.sharded.tensor import Sharded, Sharding


def _of_whole(name: str, sharding: Sharding, dim: Any, keepdim: Any = False) -> None:
    """ValueError for a reduction that leaves a dim: its elements would need those of other ranks."""
    dims = None if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    num_dims = len(sharding.shape)
    if keepdim or (dims and {d % num_dims for d in dims} != set(range(num_dims))):
        raise ValueError(
            f"{name} along dim {dim} would mix the parts of {sharding}; leave dim out, or reduce x.full_tensor(), "
            "which every rank of the axis makes, or this rank's part x.local()"
        )


def _gathered(values: Tensor, axis: Axis) -> Tensor:
    """The ranks' [N] numbers as [R, N]."""
    return all_gather_start(values.detach()[None].contiguous(), axis, 0).wait()


def _combined(value: Tensor, sharding: Sharding, combine: Callable[[Tensor], Tensor]) -> Tensor:
    return combine(_gathered(value.reshape(1), sharding.axis)[:, 0])


def _sum_up(value: Tensor, sharding: Sharding) -> Tensor:
    """The sum over the axis of a number of each rank, differentiable."""
    return (
        reduce_from(value, sharding.axis)
        if value.requires_grad
        else _combined(value, sharding, lambda v: v.sum(dtype=v.dtype))
    )


def _arguments(args: Any, kwargs: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """Positional arguments after the tensor and named ones, by name; `axis` is numpy's word for dim."""
    named = dict(zip(names, args[1:], strict=False)) | kwargs
    if "axis" in named:
        named["dim"] = named.pop("axis")
    return tuple(named.get(name) for name in names)


def _sum(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x: Sharded = args[0] if args else kwargs.pop("input")
    sharding = x._pypar_sharding
    dim, keepdim = _arguments((x, *args[1:]), kwargs, "dim", "keepdim")
    _of_whole(name, sharding, dim, keepdim)
    part, dtype = local_tensor(x), kwargs.get("dtype")
    if name == "mean":
        return _sum_up(part.sum(dtype=dtype), sharding) / sharding.shape.numel()
    return _sum_up(part.nansum(dtype=dtype) if name == "nansum" else part.sum(dtype=dtype), sharding)


def _extreme(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x: Sharded = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor) or "other" in kwargs:
        return elementwise.apply(func, name, args, kwargs)
    dim, keepdim = _arguments(args, kwargs, "dim", "keepdim")
    _of_whole(name, x._pypar_sharding, dim, keepdim or (dim is not None and name in ("max", "min")))
    _without_gradient(name, x)
    if name in ("all", "any"):
        value = local_tensor(x).all() if name == "all" else local_tensor(x).any()
        return _combined(
            value.to(torch.uint8), x._pypar_sharding, torch.amin if name == "all" else torch.amax
        ).bool()
    combine = torch.amax if name in ("max", "amax") else torch.amin
    return _combined(combine(local_tensor(x).detach()), x._pypar_sharding, combine)


def _without_gradient(name: str, x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} of {x._pypar_sharding} has no gradient; use x.detach(), or torch.no_grad()")  # type: ignore[attr-defined]


def _count_nonzero(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    _of_whole(name, args[0]._pypar_sharding, *_arguments(args, kwargs, "dim"))
    return _sum_up(local_tensor(args[0]).count_nonzero(), args[0]._pypar_sharding)


def _norm(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x: Sharded = args[0] if args else kwargs.pop("input", None)
    order_name = "p" if name == "norm" else "ord"
    order, dim, keepdim = _arguments((x, *args[1:]), kwargs, order_name, "dim", "keepdim")
    _of_whole(name, x._pypar_sharding, dim, keepdim)
    order = {None: 2.0, "fro": 2.0, "inf": math.inf, "-inf": -math.inf}.get(order, order)
    if not isinstance(order, (int, float)):
        raise ValueError(
            f"the {order!r} norm of {x._pypar_sharding} would mix its parts; take x.full_tensor()"
        )
    return _power_norm(local_tensor(x), float(order), x._pypar_sharding, kwargs.get("dtype"))


def _linalg_norm(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x: Sharded = args[0]
    order, dim, keepdim = _arguments(args, kwargs, "ord", "dim", "keepdim")
    if order is not None and len(x.shape) > 1:
        raise ValueError(
            f"the matrix norm {order!r} of {x._pypar_sharding} would mix its parts; take torch.linalg.vector_norm, or "
            "x.full_tensor()"
        )
    return _norm(
        func, "linalg_vector_norm", (x, order or 2.0, dim, bool(keepdim)), {"dtype": kwargs.get("dtype")}
    )


def _power_norm(part: Tensor, order: float, sharding: Sharding, dtype: torch.dtype | None) -> Tensor:
    if not (torch.is_grad_enabled() and part.requires_grad):
        value = torch.linalg.vector_norm(part.detach(), order, dtype=dtype)
        return _whole_norms(value.reshape(1), order, sharding.axis)[0]
    if math.isinf(order) or order == 0:
        raise ValueError(
            f"the norm of order {order} of {sharding} has no gradient; use x.detach(), or torch.no_grad()"
        )
    part = part if dtype is None else part.to(dtype)
    total = reduce_from(part.abs().pow(order).sum(), sharding.axis)
    # A norm of zeros has the gradient 0, as in torch, where the root's would be infinite.
    return total.masked_fill(total == 0, 1).pow(1 / order).masked_fill(total == 0, 0)


def _whole_norms(values: Tensor, order: float, axis: Axis) -> Tensor:
    """Norms [N] of whole tensors from those of this rank's parts, in one message; powers are summed in fp64."""
    parts = _gathered(values, axis)
    if math.isinf(order):
        return parts.amax(0) if order > 0 else parts.amin(0)
    if order == 0:
        return parts.sum(0)
    return parts.double().pow(order).sum(0).pow(1 / order).to(values.dtype)


def _foreach_norm(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """One message for all tensors of a list that are cut over one axis, whole ones among them."""
    tensors = args[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "_foreach_norm of tensors that are cut has no gradient; call it under torch.no_grad()"
        )
    with torch._C.DisableTorchFunctionSubclass():
        norms = list(func(*args, **kwargs))
    (order,) = _arguments(args, kwargs, "ord")
    by_ranks: dict[tuple[Any, ...], list[int]] = {}
    for index, x in enumerate(tensors):
        if isinstance(x, Sharded):
            by_ranks.setdefault((x._pypar_sharding.axis.ranks, norms[index].dtype), []).append(index)
    for indices in by_ranks.values():
        values = torch.stack([norms[index] for index in indices])
        whole = _whole_norms(
            values, 2.0 if order is None else float(order), tensors[indices[0]]._pypar_sharding.axis
        )
        for index, norm in zip(indices, whole.unbind(), strict=True):
            norms[index] = norm
    return norms


def _foreach_max(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [x.max() for x in args[0]]


def _dot(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    sharding = next(x._pypar_sharding for x in args if isinstance(x, Sharded))
    if len(sharding.shape) > 1:
        raise ValueError(f"{name} would mix the parts of {sharding}; use (x * y).sum(), or x.full_tensor()")
    first, second = (local_tensor(operand(x, sharding, name)) for x in args)
    return _sum_up(func(first, second), sharding)


def _spread(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """var and std, of all elements."""
    x: Sharded = args[0]
    sharding, correction = x._pypar_sharding, kwargs.get("correction", 1)
    unbiased = args[1] if len(args) == 2 and isinstance(args[1], bool) else kwargs.get("unbiased")
    dim = args[1] if len(args) > 1 and not isinstance(args[1], bool) else kwargs.get("dim")
    _of_whole(name, sharding, dim, kwargs.get("keepdim"))
    correction = int(unbiased) if unbiased is not None else correction
    variance = (x - x.mean()).square().sum() / max(0, sharding.shape.numel() - correction)
    return variance if name == "var" else variance.sqrt()


def _verdict(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """torch.equal and allclose: the same answer on every rank."""
    sharding = next(x._pypar_sharding for x in args if isinstance(x, Sharded))
    other = next((x for x in args if isinstance(x, Tensor) and x.shape != sharding.shape), None)
    if other is not None and name == "equal":
        return False
    with torch._C.DisableTorchFunctionSubclass():
        same = func(*(operand(x, sharding, name) for x in args), **kwargs)
    device = local_tensor(next(x for x in args if isinstance(x, Sharded))).device
    return bool(_combined(torch.tensor(same, dtype=torch.uint8, device=device), sharding, torch.amin))


def _unscale(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """GradScaler's check: an overflow in any rank's part is one of the whole, and all skip the step."""
    grads, found_inf, inverse_scale = args
    with torch._C.DisableTorchFunctionSubclass():
        func(grads, found_inf, inverse_scale)
    grads = [grads] if isinstance(grads, Tensor) else grads
    axes = {x._pypar_sharding.axis.ranks: x._pypar_sharding.axis for x in grads if isinstance(x, Sharded)}
    for axis in axes.values():
        all_reduce_start(found_inf, axis, dist.ReduceOp.MAX).wait()


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("sum", "nansum", "mean"), _sum),
    **dict.fromkeys(("max", "min", "amax", "amin", "all", "any"), _extreme),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
    "linalg_norm": _linalg_norm,
    **dict.fromkeys(("dot", "vdot", "inner"), _dot),
    **dict.fromkeys(("var", "std"), _spread),
    **dict.fromkeys(("equal", "allclose"), _verdict),
    **dict.fromkeys(
        ("_amp_foreach_non_finite_check_and_unscale_", "_amp_non_finite_check_and_unscale_"), _unscale
    ),
    "count_nonzero": _count_nonzero,
    "_foreach_norm": _foreach_norm,
    "_foreach_max": _foreach_max,
}
