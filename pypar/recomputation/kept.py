"""What a recomputed part of a model keeps: the rule, and the part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from pypar.recomputation.offload import Offload
from pypar.recomputation.operators import overloads, pypar_overloads


class Rule(Protocol):
    """Which of a forward's tensors are kept, and which of them move to the host.

    of_torch: operators of torch whose results may be kept. checks: backward compares what it makes again with a
    checksum of what forward had.
    """

    @property
    def of_torch(self) -> Mapping[Any, str]: ...

    @property
    def checks(self) -> bool: ...

    def keeps(self, call: int, name: str) -> bool:
        """Whether what a call of an operator returned is kept."""
        ...

    def saves(self, number: int) -> bool:
        """Whether a saved tensor is kept that is neither an input nor in a kept result."""
        ...

    def moves_input(self, number: int) -> bool:
        """Whether an input moves, where there is a host for it: the nth piece of memory of them."""
        ...

    def moves_result(self, call: int) -> bool:
        """Whether a kept result does."""
        ...

    def moves_saved(self, number: int) -> bool:
        """Whether a saved tensor that is kept does."""
        ...


@dataclass(frozen=True)
class Kept:
    """The same for every call: results of pypar's operators by name, and of torch's (overload -> name).

    of_pypar: the operators of these names, for the compiler. saves_all: nothing is made again.
    """

    names: frozenset[str] = frozenset()
    of_torch: Mapping[Any, str] = field(default_factory=dict)
    of_pypar: Mapping[Any, str] = field(default_factory=dict)
    checks: bool = False
    saves_all: bool = False

    @classmethod
    def of(cls, names: frozenset[str], checks: bool = False) -> Kept:
        """The results of the operators of these names."""
        return cls(names, overloads(names), pypar_overloads(names), checks)

    def __reduce__(self) -> Any:
        """Operators themselves have no pickle."""
        return (
            (Kept.of, (self.names, self.checks))
            if self.names
            else (Kept, (frozenset(), {}, {}, self.checks, self.saves_all))
        )

    def keeps(self, call: int, name: str) -> bool:
        return name in self.names

    def saves(self, number: int) -> bool:
        return self.saves_all

    def moves_input(self, number: int) -> bool:
        return True

    def moves_result(self, call: int) -> bool:
        return True

    def moves_saved(self, number: int) -> bool:
        return True


class Runs(Protocol):
    """Runs parts by rules of its own."""

    def run(
        self, part: Part, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The function's result."""
        ...


@dataclass
class Part:
    """What is recomputed: a part of a model with its name, its modules and what is kept.

    The parameters and buffers of the modules stay, so that saved tensors in their memory are held as they are.
    calls_torch: whether its first forward called operators of torch whose results are kept; listening to all of torch's
    operators takes 10 us each, which is left out where there are none. offload: where kept tensors go; None: they stay.
    index: of the part among the model's; is_last: its backward comes right after its forward.
    planner: who says at each call what is kept; None: `kept` does.
    """

    name: str
    kept: Kept
    modules: Sequence[nn.Module] = ()
    offload: Offload | None = None
    index: int = 0
    is_last: bool = False
    planner: Runs | None = None
    calls_torch: bool | None = None

    def memory(self) -> set[int]:
        """Of its parameters and buffers."""
        return {
            x.untyped_storage()._cdata
            for module in self.modules
            for members in (module._parameters, module._buffers)
            for x in members.values()
            if x is not None
        }
