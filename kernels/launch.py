"""One launch of a kernel: it can be run, compiled for a device that is not there, or run elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None: what the compiler finds best for many threads

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if self.max_registers is None else found | {"maxnreg": self.max_registers}

    def run(self) -> None:
        """On the current device, in Triton's interpreter where kernels were imported for it, or elsewhere."""
        run = _elsewhere.get() or _run_here
        if self.num_programs:
            run(self)


_elsewhere: ContextVar[Callable[[Launch], None] | None] = ContextVar("_elsewhere", default=None)


@contextlib.contextmanager
def launches_go_to(run: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, `run` gets the launches of this thread: an interpreter of PTX, say, or a list that collects them."""
    before = _elsewhere.set(run)
    try:
        yield
    finally:
        _elsewhere.reset(before)


def launches_go_elsewhere() -> bool:
    """Whether a function that is no device gets the launches."""
    return _elsewhere.get() is not None


def run_launches(launches: list[Launch], like: Tensor) -> None:
    """Runs them one after another on the device of `like`."""
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def _run_here(launch: Launch) -> None:
    from triton import JITFunction

    if isinstance(launch.kernel, JITFunction):
        launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.options)
    else:
        _interpret(launch)


def _interpret(launch: Launch) -> None:
    wide, given = in_fp32([launch])[0], in_fp32([launch])[0]
    wide.kernel[(wide.num_programs,)](**wide.arguments, **wide.options)
    for name, narrow in launch.arguments.items():
        x = wide.arguments[name]
        if x is not narrow and not torch.equal(
            x.view(torch.int32), given.arguments[name].view(torch.int32)
        ):  # what was only read may overlap
            narrow.copy_(x)


def in_fp32(launches: list[Launch]) -> list[Launch]:
    """Launches with copies in fp32 in place of bfloat16, with which Triton's interpreter computes as with integers.

    A copy has the strides that the kernel is told.
    """
    copies: dict[tuple[int, ...], Tensor] = {}

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.bfloat16:
            return value
        key = (value.data_ptr(), *value.shape, *value.stride())
        if key not in copies:
            copies[key] = torch.empty_strided(value.shape, value.stride(), dtype=torch.float32).copy_(value)
        return copies[key]

    return [
        replace(launch, arguments={name: wide(value) for name, value in launch.arguments.items()})
        for launch in launches
    ]
