"""A part of a forward that keeps its inputs and little else, and that backward runs again for what it needs.

Autograd hands every tensor that an operator saves to a hook (Chen et al., arXiv 1604.06174, with the mechanism of
torch's non-reentrant checkpoint). A tensor that lies in memory which stays anyway, that of an input, a parameter or a
kept result, is saved as it is. For any other the graph gets a slot with its number. When backward first asks for a slot
of the region, the forward runs again, and its nth saved tensor is the nth slot's; it ends with the last slot that is
still needed. What is in a slot lives as long as the node of the graph would have kept the tensor itself: until the node
has run, or, where the graph is retained, as between the two parts of a split backward, until the graph goes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pypar.ops.calls import listening
from pypar.recomputation.environment import Environment
from pypar.recomputation.operators import Instead, TorchCalls
from pypar.recomputation.saved import SAME, Result, Slot, Whole
from pypar.recomputation.saved_bytes import tell


@dataclass(frozen=True)
class Kept:
    """Which results a region keeps beside its inputs: of pypar's operators by name, and of torch's (overload -> name).

    of_pypar: the operators of these names, for the compiler. checks: backward compares what it makes again with a
    checksum of what forward had.
    """

    names: frozenset[str] = frozenset()
    of_torch: Mapping[Any, str] = field(default_factory=dict)
    of_pypar: Mapping[Any, str] = field(default_factory=dict)
    checks: bool = False


@dataclass
class Part:
    """What is recomputed: a part of a model with its name, its modules and what is kept.

    The parameters and buffers of the modules stay, so that saved tensors in their memory are held as they are.
    calls_torch: whether its first forward called operators of torch whose results are kept; listening to all of torch's
    operators takes 10 us each, which is left out where there are none.
    """

    name: str
    kept: Kept
    modules: Sequence[nn.Module] = ()
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


class _EnoughError(BaseException):
    """Ends a forward that runs again; no Exception, as a model may catch those."""


@dataclass
class _LastCall:
    """The last operator that was called: which of the tensors saved since are its inputs.

    Where all that are still needed are, nobody needs its outputs, and the second time it is not computed.
    """

    number: int = -1
    inputs: dict[Any, int] = field(default_factory=dict)
    alive: list[Tensor] = field(
        default_factory=list
    )  # the inputs, whose memory may not be another's meanwhile
    slots: dict[int, int] = field(default_factory=dict)  # number of the slot -> of the input
    is_enough: bool = True


def _place(x: Tensor) -> Any:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


class Region:
    """One call of a function, of which backward makes again what it needs."""

    def __init__(self, part: Part, function: Callable[..., Any]) -> None:
        self.name, self.checks = part.name, part.kept.checks
        self._part, self._function = part, function
        self._hears_torch = bool(part.kept.of_torch) and part.calls_torch is not False
        self._stays = part.memory()
        self._slots: dict[int, weakref.ref[Slot]] = {}
        self._results: dict[int, tuple[int, Result]] = {}  # call -> (tensors saved before it, its result)
        self._num_saved = self._num_calls = 0
        self._last_call = _LastCall()
        self.is_computing = False
        self._held: list[Tensor] = []  # saved as they are, until the end of the forward
        self._written: set[int] = set()  # memory into which torch's operators have written
        self._shown: list[Whole] = []  # kept results that the function returned, into which others may write

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result, for which autograd saves what the region keeps."""
        leaves, self._structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._inputs = [(Whole(x), x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        self._stays.update(x.untyped_storage()._cdata for x in tensors)
        self._environment = Environment.now(tensors)
        with self._heard_by(self, saved_tensors_hooks(self._save, _get)) as torch_calls:
            outputs = self._function(*args, **kwargs)
        if torch_calls is not None:
            self._part.calls_torch = self._part.calls_torch or torch_calls.has_heard
        self._close(tensors, outputs)
        return outputs

    @contextlib.contextmanager
    def _heard_by(self, listener: Region | _Again, hooks: saved_tensors_hooks) -> Iterator[TorchCalls | None]:
        """Inside, the listener hears of operators, and the hooks of saved tensors."""
        with listening(listener), hooks:
            if not self._hears_torch:
                yield None
                return
            with TorchCalls(listener, self._part.kept.of_torch) as torch_calls:
                yield torch_calls

    def _save(self, x: Tensor) -> Whole | Slot:
        number, self._num_saved = self._num_saved, self._num_saved + 1
        if x.layout is not torch.strided or x.untyped_storage()._cdata in self._stays or not x.numel():
            self._held.append(x)
            return Whole(x)
        slot = Slot(self, x)
        self._slots[number] = weakref.ref(slot)
        source = self._last_call.inputs.get(_place(x))
        if source is None:
            self._last_call.is_enough = False
        else:
            self._last_call.slots[number] = source
        return slot

    def call(self, name: str, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """Of the first forward: `pypar.ops.calls.Listener`."""
        if self.is_computing:
            return compute()
        outputs = self._computed(name, compute)
        places = {_place(x): i for i, x in enumerate(inputs) if isinstance(x, Tensor)}
        alive = [x for x in inputs if isinstance(x, Tensor)]
        self._last_call = _LastCall(self._num_calls - 1, places, alive)
        return outputs

    def call_under_autograd(self, name: str, compute: Callable[[], Any]) -> Any:
        """Likewise. What it saves is saved before its result is there."""
        return compute() if self.is_computing else self._computed(name, compute)

    def _computed(self, name: str, compute: Callable[[], Any]) -> Any:
        self.is_computing = True
        try:
            outputs = compute()
        finally:
            self.is_computing = False
        if name in self._part.kept.names:
            result = Result.of(name, outputs)
            self._results[self._num_calls] = self._num_saved, result
            memory = {x.x.untyped_storage()._cdata for x in result.tensors}
            self._stays |= memory
            self._written -= memory  # what was there before, and is gone
        self._num_calls += 1
        return outputs

    def written(self, x: Tensor) -> None:
        """An operator of torch has written into x."""
        self._written.add(x.untyped_storage()._cdata)

    def _is_as_it_was(self, result: Result) -> bool:
        """Whether nobody has written into an operator's result; else the operator runs again too."""
        return not any(x.is_written or x.x.untyped_storage()._cdata in self._written for x in result.tensors)

    def _close(self, inputs: Sequence[Tensor], outputs: Any) -> None:
        """After the forward: nothing is held that the second one does not come to."""
        self._environment.forget_unused()
        self._stays.clear()
        last = max(self._slots, default=-1)
        self._results = {
            n: (at, result)
            for n, (at, result) in self._results.items()
            if at <= last and self._is_as_it_was(result)
        }
        if self._last_call.is_enough:
            self._results.pop(self._last_call.number, None)
        self._last_call.inputs, self._last_call.alive = {}, []
        held = [x.x for _, result in self._results.values() for x in result.tensors]
        memory = {x.untyped_storage()._cdata for x in held}
        self._shown = [
            Whole(x)
            for x in tree_leaves(outputs)
            if isinstance(x, Tensor) and x.untyped_storage()._cdata in memory
        ]
        tell([*self._held, *held, *(inputs if self._slots else ())])
        self._held = []
        if not self._slots:
            self._inputs = []

    def run_again(self) -> None:
        """Fill the slots that are still needed and empty."""
        for shown in self._shown:
            shown.get()
        wanted = {number: slot for number, ref in self._slots.items() if (slot := ref()) is not None}
        again = _Again(self, {number: slot for number, slot in wanted.items() if slot.x is None})
        leaves = [x[0].get().detach().requires_grad_(x[1]) if type(x) is tuple else x for x in self._inputs]
        args, kwargs = tree_unflatten(leaves, self._structure)
        hooks = saved_tensors_hooks(again.save, lambda x: x)
        with (
            torch.enable_grad(),
            self._environment.restored(),
            contextlib.suppress(_EnoughError),
            self._heard_by(again, hooks),
        ):
            self._function(*args, **kwargs)
        if again.wanted:
            raise RuntimeError(
                f"{self.name} saved {again.num_saved} tensors in backward where its forward saved "
                f"{self._num_saved}; {SAME}"
            )


class _Again:
    """The listener and the hook of a forward that runs again."""

    def __init__(self, region: Region, wanted: dict[int, Slot]) -> None:
        self._region, self.wanted = region, wanted
        self.num_saved = self._num_calls = 0
        self.is_computing = False

    def save(self, x: Tensor) -> Tensor:
        slot = self.wanted.get(self.num_saved)
        if slot is not None:
            slot.take(x)
            del self.wanted[self.num_saved]
            if not self.wanted:
                raise _EnoughError
        self.num_saved += 1
        return x.detach()

    def call(self, name: str, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
        if self.is_computing:
            return compute()
        last = self._region._last_call
        if self._num_calls == last.number and last.is_enough and all(n in last.slots for n in self.wanted):
            for n, slot in self.wanted.items():
                slot.take(inputs[last.slots[n]])
            self.wanted = {}
            raise _EnoughError
        kept = self._kept(name)
        return self._computed(compute) if kept is None else kept.again()

    def written(self, x: Tensor) -> None:
        """Of no interest."""

    def call_under_autograd(self, name: str, compute: Callable[[], Any]) -> Any:
        if self.is_computing:
            return compute()
        kept = self._kept(name)
        with contextlib.nullcontext() if kept is None else Instead(kept.again()):
            return self._computed(compute)

    def _computed(self, compute: Callable[[], Any]) -> Any:
        self.is_computing = True
        try:
            return compute()
        finally:
            self.is_computing = False

    def _kept(self, name: str) -> Result | None:
        """What the forward kept of the call that is due, None where it kept nothing."""
        _, kept = self._region._results.get(self._num_calls, (0, None))
        self._num_calls += 1
        if kept is not None and kept.name != name:
            raise RuntimeError(
                f"{self._region.name} called {name} in backward where its forward called {kept.name}; {SAME}"
            )
        return kept


def _get(saved: Whole | Slot) -> Tensor:
    return saved.get()
