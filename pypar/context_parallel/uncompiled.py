"""Functions that torch.compile leaves out of its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo  # torch.compiler.disable would import the whole compiler

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(reason: str) -> Callable[[Function], Function]:
    """A decorator. Where a graph must not break, torch's error has the reason."""

    def decorate(function: Function) -> Function:
        call = _disable_dynamo(function)
        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate
