"""Which operations of torch a `Sharded` takes part in, and how; all others are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch._guards import TracingContext

from pypar.ops.uncompiled import uncompiled
from pypar.sharded import attributes, collectives, elementwise, initialise, reductions
from pypar.sharded.tensor import Sharded

Handler = Callable[[Callable[..., Any], str, Any, dict[str, Any]], Any]


@uncompiled("operations on tensors that are cut are not compiled")
def run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What `Sharded.__torch_function__` does: ``func`` with the whole tensors that the arguments stand for."""
    if TracingContext.try_get() is not None:
        _leave_graph()
    name, handler = _how(func)
    return handler(func, name, args, kwargs)


def _leave_graph() -> None:
    """torch.compile would take a part for the whole: its graph ends before the tensor is used, and goes on after."""
    from torch._dynamo import config, exc

    if Sharded not in config.nontraceable_tensor_subclasses:
        config.nontraceable_tensor_subclasses.add(Sharded)  # from now on it does not try
        raise exc.Unsupported(
            "a tensor that is cut over an axis stays out of torch.compile's graphs", "Sharded"
        )


@functools.lru_cache(maxsize=4096)
def _how(func: Callable[..., Any]) -> tuple[str, Handler]:
    name = name_of(func)
    return name, _HANDLERS.get(name) or (attributes.read if name.startswith("get ") else _refuse)


def name_of(func: Callable[..., Any]) -> str:
    """ "add", "add_", "get shape", "set data", ...: one name for a function, a method and an operator."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        owner = func.__self__  # type: ignore[attr-defined]
        attribute = getattr(owner, "__name__", None) or owner.fget.__name__
        return f"{name.strip('_')[:3]} {attribute}"
    return name


def _refuse(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> NoReturn:
    sharding = next(x._pypar_sharding for x in _flat((args, kwargs)) if isinstance(x, Sharded))
    raise ValueError(
        f"{name.removeprefix('linalg_')} would mix the parts of {sharding}, which its ranks "
        f"{list(sharding.axis.ranks)} hold; take the whole tensor with x.full_tensor(), which every one of them calls, "
        "or this rank's part with x.local()"
    )


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for each in value for x in _flat(each)] if isinstance(value, (list, tuple)) else []


_HANDLERS: dict[str, Handler] = {
    **elementwise.HANDLERS,
    **reductions.HANDLERS,
    **initialise.HANDLERS,
    **attributes.HANDLERS,
    **collectives.HANDLERS,
}
