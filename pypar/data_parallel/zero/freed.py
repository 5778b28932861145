"""A parameter whose memory is not there: what it still says of itself, and a sentence for the rest.

torch's kernels would read the missing memory and end the process. The object stays the same: its class changes for as
long as its memory is away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pypar.sharded import Sharded

_SAYS = frozenset(
    (
        "__hash__",
        "size",
        "numel",
        "nelement",
        "dim",
        "ndimension",
        "stride",
        "storage_offset",
        "element_size",
        "__len__",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "get_device",
        "untyped_storage",
        "requires_grad_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "__set__",
        "__delete__",
        "has_names",
        "_is_view",
        "is_shared",
        "is_pinned",
        "is_same_size",
    )
)
_HIDES = frozenset((torch.Tensor.data, torch.Tensor.T, torch.Tensor.mT, torch.Tensor.H, torch.Tensor.real))


def _run(cls: Any, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    name = getattr(func, "__name__", "")
    is_attribute = name == "__get__" and getattr(func, "__self__", None) not in _HIDES
    if is_attribute or name in _SAYS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
    what = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
    raise RuntimeError(
        f"{what} needs the values of a parameter that is cut over ranks and gathered for its block's forward and "
        "backward only; read or write it inside `with store.gathered():`, save it with store.state_dict(), and give "
        "optimizers store.parameters(); convert or move a model before its store is made"
    )


class FreedParameter(nn.Parameter):
    """What a plain parameter is while its memory is away."""

    __torch_function__ = classmethod(_run)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FreedParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


class FreedSharded(Sharded):
    """What a parameter that tensor parallelism cut is while its memory is away."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__") and getattr(func, "__self__", None) not in _HIDES:
            return super().__torch_function__(func, types, args, kwargs)
        return _run(cls, func, types, args, kwargs)


_FREED: dict[type, type] = {nn.Parameter: FreedParameter, Sharded: FreedSharded}
_HERE = {freed: here for here, freed in _FREED.items()}


def show_freed(parameter: nn.Parameter) -> None:
    """Let a parameter whose memory is away answer with a sentence."""
    parameter.__class__ = _FREED.get(type(parameter), type(parameter))  # type: ignore[assignment]


def show_here(parameter: nn.Parameter) -> None:
    """Let a parameter whose memory is there be itself again."""
    parameter.__class__ = _HERE.get(type(parameter), type(parameter))  # type: ignore[assignment]
