"""One launch of a kernel: it can be run, compiled for a device that is not there, or run elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """An argument int64 [lists + numbers, n] by which a kernel finds the n tensors of each of several lists.

    A row for each list says how many bytes behind the table the tensors begin, 0 for a list of none; a row for each of
    numbers has these.
    """

    lists: tuple[list[Tensor], ...]
    numbers: tuple[list[int], ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for column in self.lists for x in column]

    def into(self, place: Tensor) -> Tensor:
        """Writes the table into `place`, int64 where the tensors are, and returns it. Nobody waits for a GPU."""
        begin, none = place.data_ptr(), [0] * place.shape[1]
        offsets = [[x.data_ptr() - begin for x in column] or none for column in self.lists]
        rows = torch.tensor([*offsets, *self.numbers])
        return place.copy_(rows.pin_memory() if place.is_cuda else rows, non_blocking=True)

    def written(self) -> Tensor:
        """The table in memory of its own."""
        shape = len(self.lists) + len(self.numbers), len(self.numbers[0])
        return self.into(torch.empty(shape, dtype=torch.int64, device=self.lists[0][0].device))


@dataclass(frozen=True)
class Launch:
    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None: what the compiler finds best for many threads
    is_contracted: bool = True  # whether a product and a sum may be rounded once, together

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        found |= {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return found if self.is_contracted else found | {"enable_fp_fusion": False}

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
        launch.kernel[(launch.num_programs,)](**with_tables(launch).arguments, **launch.options)
    else:
        _interpret(launch)


def with_tables(launch: Launch) -> Launch:
    """The launch with its tables in memory, beside which its tensors must stay alive."""
    written = {name: x.written() for name, x in launch.arguments.items() if isinstance(x, Table)}
    return replace(launch, arguments=launch.arguments | written) if written else launch


def tensors_of(launch: Launch) -> dict[str, Tensor]:
    """All that the kernel reads and writes, by the names of arguments, and of a table's rows and columns."""
    found = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
    for name, table in launch.arguments.items():
        if isinstance(table, Table):
            for row, column in enumerate(table.lists):
                found |= {f"{name}[{row}, {i}]": x for i, x in enumerate(column)}
    return found


def _interpret(launch: Launch) -> None:
    wide, given = in_fp32([launch])[0], in_fp32([launch])[0]
    wide.kernel[(wide.num_programs,)](**with_tables(wide).arguments, **wide.options)
    results, before = tensors_of(wide), tensors_of(given)
    for name, narrow in tensors_of(launch).items():
        x = results[name]
        if x is not narrow and not torch.equal(
            x.view(torch.int32), before[name].view(torch.int32)
        ):  # what was only read may overlap
            narrow.copy_(x)


def in_fp32(launches: list[Launch]) -> list[Launch]:
    """Launches with copies in fp32 in place of bfloat16, with which Triton's interpreter computes as with integers.

    A copy has the strides that the kernel is told.
    """
    import triton.language as tl

    copies: dict[tuple[int, ...], Tensor] = {}

    def wide(value: Any) -> Any:
        if isinstance(value, Table):
            return replace(value, lists=tuple([wide(x) for x in column] for column in value.lists))
        if value is tl.bfloat16:
            return tl.float32
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
