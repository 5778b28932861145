"""Operators whose results a recomputation may keep, by the names that `ops` gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pypar.ops.backend import unknown_name
from pypar.ops.calls import Listener

# Torch's own operators that count as one of these; pypar's have the name themselves.
_OF_TORCH = {
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "linear": ("mm", "addmm", "linear"),
    "matmul": ("bmm", "baddbmm"),
    "grouped_matmul": ("_grouped_mm",),
    "topk": ("topk",),
    "rms_norm": ("_fused_rms_norm",),
    "layer_norm": ("native_layer_norm",),
    "convolution": ("convolution",),
}
_OF_PYPAR = ("rope", "gated", "merge_attention", "moe_permute")
NAMES = tuple(sorted({*_OF_TORCH, *_OF_PYPAR}))

# What costs more than reading its inputs, and a router's choice, which must not be another one the second time.
COSTLY = ("attention", "linear", "matmul", "grouped_matmul", "convolution", "topk")


def check_names(ops: Iterable[str]) -> frozenset[str]:
    """The names as a set; ValueError for one that there is not."""
    for name in ops:
        if name not in NAMES:
            raise ValueError(unknown_name("operator", name, NAMES, "recompute, ops: "))
    return frozenset(ops)


def overloads(names: Iterable[str]) -> Mapping[Any, str]:
    """Torch's operators of these names, as a dispatch mode meets them -> the name."""
    found = {}
    for name in names:
        for packet in (getattr(torch.ops.aten, op, None) for op in _OF_TORCH.get(name, ())):
            if packet is not None and "default" in packet.overloads():
                found[packet.default] = name
    return found


def pypar_overloads(names: Iterable[str]) -> Mapping[Any, str]:
    """pypar's registered operators of these names, likewise."""
    import pypar.ops  # noqa: F401 - which registers them

    forwards = {name: getattr(torch.ops.pypar, f"{name}_forward", None) for name in names}
    return {packet.default: name for name, packet in forwards.items() if packet is not None}


# Small results that a model may write into, as Mixtral does into the weights of its experts: copies are kept.
COPIED = ("topk",)


class Hearing(Listener, Protocol):
    """A listener that says whether it is computing, and would answer no call."""

    is_computing: bool

    def written(self, x: Tensor) -> None:
        """An operator has written into x."""
        ...


class TorchCalls(TorchDispatchMode):
    """Tells a listener of calls of torch's own operators, as `pypar.ops.calls` tells of pypar's."""

    def __init__(self, listener: Hearing, names: Mapping[Any, str]) -> None:
        super().__init__()
        self._listener, self._names = listener, names
        self.has_heard = False  # of any of them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap what follows in two functions, at each call."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = self._names.get(func)
        if func._schema.is_mutable:
            for x, argument in zip(args, func._schema.arguments, strict=False):
                if isinstance(x, Tensor) and argument.is_write:
                    self._listener.written(x)
        if name is None or self._listener.is_computing:
            return func(*args, **(kwargs or {}))
        self.has_heard = True
        return self._listener.call(name, args, lambda: func(*args, **(kwargs or {})))


class Instead(TorchDispatchMode):
    """Inside, a product of matrices is not computed: its result [..., O] is the one that is given."""

    _PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self._result = result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._PRODUCTS:
            return self._result.view(-1, self._result.shape[-1])
        return func(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
