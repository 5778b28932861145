"""Functions that torch.compile leaves out of its graphs, and torch.func's transforms out of theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)


def uncompiled(reason: str) -> Callable[[Function], Function]:
    """A decorator: torch.compile's graph ends before the function and another begins after it.

    The function and all that it calls run as they are written. Where a graph must not break (fullgraph=True),
    torch's error has the reason. It is torch.compiler.disable, which would import the whole compiler: seconds for
    those who compile nothing.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            callback = eval_frame.set_eval_frame(None)
            try:
                return function(*args, **kwargs)
            finally:
                eval_frame.set_eval_frame(callback)

        _leave_frame(call.__code__)  # type: ignore[attr-defined]
        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def uncompiled_class(reason: str) -> Callable[[Class], Class]:
    """`uncompiled` for the public functions of a class, under all their names, and for its `__init__`."""

    def decorate(cls: Class) -> Class:
        functions = {name: x for name, x in vars(cls).items() if isinstance(x, FunctionType)}
        public = {x for name, x in functions.items() if not name.startswith("_") or name == "__init__"}
        wrapped = {x: uncompiled(reason)(x) for x in public}
        for name, x in functions.items():
            if x in wrapped:
                setattr(cls, name, wrapped[x])
        return cls

    return decorate


def between_ranks(name: str) -> Callable[[Function], Function]:
    """`uncompiled` for what ranks do together; torch.func's transforms and torch.export are refused, on every rank."""

    is_exporting = getattr(
        torch.compiler, "is_exporting", lambda: False
    )  # not in the oldest torch that we take

    def decorate(function: Function) -> Function:
        @uncompiled(f"{name} is communication between ranks; compile without fullgraph=True")
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch._C._are_functorch_transforms_active():
                raise ValueError(
                    f"{name} is communication between ranks, which torch.func's transforms (grad, vmap, jvp, ...) "
                    "do not pass through; use backward() or torch.autograd.grad, and a loop in place of vmap"
                )
            if is_exporting():
                raise ValueError(
                    f"{name} is communication between ranks, and what torch.export writes is one process's; export the "
                    "model as it is before it is spread over ranks"
                )
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _leave_frame(code: Any) -> None:
    """Frames of this code are not compiled; those that they call may be."""
    if hasattr(eval_frame, "skip_code"):  # torch < 2.7
        eval_frame.skip_code(code)
    else:
        action = eval_frame._FrameAction
        strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
        eval_frame.set_code_exec_strategy(code, strategy)
