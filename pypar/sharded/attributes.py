"""What a `Sharded` says of itself, its gradient and data, and how it is copied, shown and differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pypar.layout import local_tensor
from pypar.sharded.elementwise import operand
from pypar.sharded.tensor import Sharded, Sharding, wrap

_PASSED = """
__hash__ _has_compatible_shallow_copy_type _is_view _is_zerotensor backward data_ptr dense_dim detach_ dim element_size
get_device has_names is_complex is_conj is_contiguous is_floating_point is_inference is_neg is_nonzero is_pinned
is_same_size is_set_to is_shared is_signed is_sparse ndimension record_stream register_post_accumulate_grad_hook
requires_grad_ retain_grad share_memory_ sparse_dim storage_offset untyped_storage
"""
_MOVED = ("T", "mT", "H", "mH", "imag", "real", "_base")


def _pass(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What is the same for a part as for the whole, or belongs to this rank's memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def read(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Attributes that are not listed below: dtype, device, grad_fn, is_leaf, ..."""
    attribute = name.removeprefix("get ")
    if attribute in _MOVED:
        raise ValueError(
            f"x.{attribute} of {args[0]._pypar_sharding} would mix its parts; take x.full_tensor(), on every rank of "
            "the axis, or x.local(), this rank's part"
        )
    return _pass(func, name, args, kwargs)


def _shape(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[0]._pypar_sharding.shape


def _size(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    shape, rest = args[0]._pypar_sharding.shape, (*args[1:], *kwargs.values())
    return shape if not rest or rest[0] is None else shape[rest[0]]


def _numel(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> int:
    return (args or tuple(kwargs.values()))[0]._pypar_sharding.shape.numel()


def _len(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> int:
    return args[0]._pypar_sharding.shape[0]


def _stride(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    return torch.empty(args[0]._pypar_sharding.shape, device="meta").stride(*args[1:], **kwargs)


def _nbytes(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> int:
    return args[0]._pypar_sharding.shape.numel() * args[0].element_size()


def _get_data(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Sharded:
    return wrap(local_tensor(args[0]).data, args[0]._pypar_sharding)


def _set(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """x.data = y, x.grad = y: y is cut alike, or whole, or None."""
    target, value = args
    sharding: Sharding = target._pypar_sharding
    if isinstance(value, Tensor) and not isinstance(value, Sharded):
        if value.shape != sharding.shape:
            raise ValueError(
                f"x.{name[4:]} of {sharding} cannot become a plain tensor {tuple(value.shape)}; give the whole "
                f"{tuple(sharding.shape)}, or a tensor made with torch.zeros_like(x) and filled"
            )
        value = target.part_of(value)
    elif value is not None:
        operand(value, sharding, name)  # cut alike
    with torch._C.DisableTorchFunctionSubclass():
        func(target, value)


def _write(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    return _pass(func, name, args, kwargs)


def _get_grad(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The gradient as autograd left it, from now on as a `Sharded`, in the same memory."""
    x = args[0]
    with torch._C.DisableTorchFunctionSubclass():
        grad: Tensor | None = func(x)
        if grad is None or type(grad) is Sharded:
            return grad
        x.grad = wrap(grad, x._pypar_sharding)
        shown: Tensor | None = func(x)
        return shown


def _register_hook(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    x, hook = args
    sharding = x._pypar_sharding

    def call(grad: Tensor) -> Tensor | None:
        changed = hook(wrap(grad, sharding))
        return None if changed is None else local_tensor(operand(changed, sharding, "a hook's gradient"))

    with torch._C.DisableTorchFunctionSubclass():
        return func(x, call)


def _autograd_grad(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """torch.autograd.grad: the gradients of tensors that are cut are cut alike."""
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with torch._C.DisableTorchFunctionSubclass():
        grads = func(*args, **kwargs)
    return tuple(
        wrap(grad, x._pypar_sharding) if isinstance(x, Sharded) and grad is not None else grad
        for x, grad in zip(inputs, grads, strict=True)
    )


def _deepcopy(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Sharded:
    x, memo = args
    if id(x) in memo:
        return memo[id(x)]
    if not x.is_leaf:
        raise RuntimeError(
            f"only leaves of autograd's graph are copied, and {x._pypar_sharding} was computed; detach it"
        )
    made = wrap(local_tensor(x).detach().clone(), x._pypar_sharding)
    made.requires_grad_(x.requires_grad)
    for key, value in vars(x).items():
        if key not in ("_pypar_sharding", "_backward_hooks"):
            setattr(made, key, value)
    memo[id(x)] = made
    grad = x.grad
    if grad is not None:
        made.grad = _deepcopy(None, name, (grad, memo), {})
    return made


def _pickle(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    raise ValueError(
        f"{args[0]._pypar_sharding} is not pickled, for it belongs to this job's ranks; save model.state_dict() with "
        "torch.distributed.checkpoint, or whole tensors (x.full_tensor(), which every rank of the axis calls)"
    )


def _repr(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> str:
    x: Sharded = args[0]
    sharding = x._pypar_sharding
    return f"Sharded({sharding}; rank {sharding.axis.rank} of {sharding.axis.size} holds\n{local_tensor(x).detach()!r})"


def _new(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """x.new_zeros(...), new_tensor(...): plain tensors of the same dtype and device."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(local_tensor(args[0]).detach(), *args[1:], **kwargs)


def _as_shape_of(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """y.view_as(x), y.expand_as(x), y.reshape_as(x) and y.type_as(x)."""
    y, x = args
    if name == "type_as":
        return y.to(local_tensor(x).dtype)
    if isinstance(y, Sharded):
        if y.shape == x.shape:
            return y
        raise ValueError(f"{name} would mix the parts of {y._pypar_sharding}; take y.full_tensor()")
    method = {"view_as": y.view, "reshape_as": y.reshape, "expand_as": y.expand}[name]
    return method(x.shape)


def _whole_index(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """x[:], x[...], x[:] = y and x[mask] = number; other indices would need other ranks' elements."""
    x, index = args[:2]
    is_mask = isinstance(index, Sharded) and index.dtype == torch.bool
    if is_mask and name == "__setitem__" and (not isinstance(args[2], Tensor) or args[2].dim() == 0):
        x.masked_fill_(index, args[2])
        return None
    is_all = index is Ellipsis or (isinstance(index, slice) and index == slice(None))
    if not isinstance(x, Sharded) or not is_all:
        sharding = next(each._pypar_sharding for each in args if isinstance(each, Sharded))
        raise ValueError(
            f"indexing would mix the parts of {sharding}; index x.full_tensor(), which every rank of the axis makes, "
            "or this rank's part x.local()"
        )
    if name == "__getitem__":
        return x
    x.copy_(args[2]) if isinstance(args[2], Tensor) else x.fill_(args[2])
    return None


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_PASSED.split(), _pass),
    **dict.fromkeys(("set requires_grad", "set _backward_hooks", "set names", "del grad"), _write),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"), _new),
    **dict.fromkeys(("view_as", "expand_as", "reshape_as", "type_as"), _as_shape_of),
    **dict.fromkeys(("set data", "set grad"), _set),
    **dict.fromkeys(("__getitem__", "__setitem__"), _whole_index),
    **dict.fromkeys(("__repr__", "__str__", "__format__"), _repr),
    **dict.fromkeys(("__reduce_ex__", "__reduce__"), _pickle),
    "get shape": _shape,
    "size": _size,
    "numel": _numel,
    "nelement": _numel,
    "__len__": _len,
    "stride": _stride,
    "get nbytes": _nbytes,
    "get data": _get_data,
    "get grad": _get_grad,
    "register_hook": _register_hook,
    "grad": _autograd_grad,
    "__deepcopy__": _deepcopy,
}
