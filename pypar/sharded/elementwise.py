"""Operations on each element alone, on one tensor or on lists of them: each rank does them to its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pypar.comm import copy_to
from pypar.sharded.tensor import Sharded, Sharding, wrap

_NAMES = """
__and__ __eq__ __floordiv__ __invert__ __or__ __rdiv__ __rfloordiv__ __rmod__ __rpow__ __rsub__ __xor__
abs absolute acos acosh add addcdiv addcmul alias asin asinh atan atan2 atanh bfloat16 bitwise_and bitwise_not
bitwise_or bitwise_xor bool ceil clamp clamp_max clamp_min clip clone conj conj_physical contiguous copy copysign cos
cosh cpu cuda detach div divide double elu empty_like eq erf erfc erfinv exp exp2 expm1 fill float float_power floor
floor_divide fmax fmin fmod frac full_like ge gelu greater greater_equal gt half hardtanh heaviside hypot int
isclose isfinite isinf isnan isneginf isposinf ldexp le leaky_relu lerp less less_equal log log10 log1p log2
logical_and logical_not logical_or logical_xor long lt masked_fill maximum minimum mul multiply nan_to_num ne neg
negative nextafter not_equal ones_like pin_memory positive pow reciprocal relu remainder resolve_conj
resolve_neg round rsqrt rsub sgn sigmoid sign signbit silu sin sinh softplus sqrt square sub
subtract tan tanh threshold to true_divide truediv trunc type where xlogy zero zeros_like
"""
_FOREACH_NAMES = """
abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min copy cos cosh div erf erfc exp expm1 floor frac lerp
log log10 log1p log2 maximum minimum mul neg pow reciprocal round rsqrt sigmoid sign sin sinh sqrt sub tan tanh trunc
zero
"""
_FUSED = ("_fused_adam_", "_fused_adamw_", "_fused_adagrad_", "_fused_sgd_")


def operand(x: Any, sharding: Sharding, name: str) -> Any:
    """This rank's part of what stands beside a tensor that is cut so. Numbers and None stay as they are."""
    if not isinstance(x, Tensor):
        return x
    if isinstance(x, Sharded):
        if not sharding.fits(x._pypar_sharding):
            raise ValueError(
                f"{name} of {sharding} and of {x._pypar_sharding} would pair other elements on each rank; take "
                "x.full_tensor() of both, which every rank of the axis calls"
            )
        return x
    if isinstance(x, DTensor):
        if not _is_cut_so(x, sharding):
            raise ValueError(
                f"{name} pairs {sharding} with a DTensor {tuple(x.shape)} on {x.device_mesh} {x.placements}, which has "
                "other parts on its ranks; take x.full_tensor() of the DTensor"
            )
        return x._local_tensor
    shape = x.shape
    if _broadcast_shape(shape, sharding.shape) != sharding.shape:
        raise ValueError(
            f"{name} pairs {sharding} with a plain tensor {tuple(shape)}, which has neither its shape nor one that is "
            "broadcast to it; pass the whole tensor, or work on this rank's part with x.local()"
        )
    if x.requires_grad and torch.is_grad_enabled():
        x = copy_to(x, sharding.axis)  # each rank's gradient of it is of its own part alone
    return sharding.part(x)


def _is_cut_so(x: DTensor, sharding: Sharding) -> bool:
    placed = [(p, n) for p, n in zip(x.placements, x.device_mesh.shape, strict=True) if n > 1]
    if x.shape != sharding.shape or len(placed) != 1:
        return False
    placement, size = placed[0]
    ranks = tuple(x.device_mesh.mesh.flatten().tolist())
    return (
        isinstance(placement, Shard)
        and placement.dim == sharding.even_dim
        and size == sharding.axis.size
        and ranks == sharding.axis.ranks
    )


def _broadcast_shape(first: torch.Size, second: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError:
        return None


def _sharding_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Sharding:
    for x in args:
        if type(x) is Sharded:
            return x._pypar_sharding
    return next(x._pypar_sharding for x in kwargs.values() if type(x) is Sharded)


def refuse_plain_result(target: Any, sharding: Sharding, name: str) -> None:
    """A plain tensor cannot take in a result of which each rank has a part."""
    if (
        target is not None
        and type(target) is not Sharded
        and isinstance(target, Tensor)
        and not isinstance(target, DTensor)
    ):
        raise ValueError(
            f"{name} would write {sharding}, of which each rank has a part, into a plain tensor "
            f"{tuple(target.shape)}; make that with torch.zeros_like(x) of the sharded tensor, or read x.full_tensor()"
        )


def is_in_place(name: str) -> bool:
    """By torch's rule for names."""
    return name.endswith("_") and not name.endswith("__")


def apply(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """func on the parts of all tensors among the arguments, whose result is cut as they are."""
    sharding = _sharding_of(args, kwargs)
    target = args[0] if args and is_in_place(name) else kwargs.get("out")
    if target is not None and type(target) is not Sharded:
        refuse_plain_result(target, sharding, name)
    with torch._C.DisableTorchFunctionSubclass():
        for x in args:
            if not _goes_as_it_is(x, sharding):
                args = [operand(x, sharding, name) for x in args]
                break
        if kwargs:
            kwargs = {key: operand(x, sharding, name) for key, x in kwargs.items()}
        result = func(*args, **kwargs)
    if target is not None:
        return target
    return wrap(result, sharding) if type(result) is Tensor else result


def _goes_as_it_is(x: Any, sharding: Sharding) -> bool:
    """Whether torch can be given x itself: what `operand` would find out, of most operands in a moment."""
    if type(x) is Sharded:
        return x._pypar_sharding is sharding
    return (
        type(x) is float
        or not isinstance(x, Tensor)
        or (type(x) is Tensor and not x.dim() and not x.requires_grad)
    )


def apply_foreach(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Apply an operation to lists of tensors, whole ones and cut ones in any mixture."""
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple))]
    shardings: list[Sharding | None] = [None] * max(map(len, lists))
    for members in lists:
        for index, x in enumerate(members):
            if type(x) is Sharded and shardings[index] is None:
                shardings[index] = x._pypar_sharding
    if is_in_place(name):
        for target, sharding in zip(args[0], shardings, strict=False):
            if sharding is not None:
                refuse_plain_result(target, sharding, name)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(
            *(_parts(x, shardings, name) for x in args),
            **{key: _parts(x, shardings, name) for key, x in kwargs.items()},
        )
    if not isinstance(result, (list, tuple)) or is_in_place(name):
        return result
    return [
        x if sharding is None else wrap(x, sharding) for x, sharding in zip(result, shardings, strict=True)
    ]


def _parts(x: Any, shardings: list[Sharding | None], name: str) -> Any:
    if not isinstance(x, (list, tuple)):
        return x
    pairs = list(zip(x, shardings, strict=False))
    if all(sharding is None or _goes_as_it_is(each, sharding) for each, sharding in pairs):
        return x
    return [each if sharding is None else operand(each, sharding, name) for each, sharding in pairs]


def _variants(names: str, prefix: str = "") -> list[str]:
    return [
        f"{prefix}{name}{ending}"
        for name in names.split()
        for ending in (("",) if name.startswith("__") else ("", "_"))
    ]


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_variants(_NAMES), apply),
    **dict.fromkeys(_variants(_FOREACH_NAMES, "_foreach_"), apply_foreach),
    **dict.fromkeys(_FUSED, apply_foreach),
}
