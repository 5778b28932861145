"""A part of a forward that keeps its inputs and little else, and that backward runs again for what it needs.

Autograd hands every tensor that an operator saves to a hook (Chen et al., arXiv 1604.06174, with the mechanism of
torch's non-reentrant checkpoint). A tensor that lies in memory which stays anyway, that of an input, a parameter or a
kept result, is saved as it is. For any other the graph gets a slot with its number. When backward first asks for a slot
of the region, the forward runs again, and its nth saved tensor is the nth slot's; it ends with the last slot that is
still needed. What is in a slot lives as long as the node of the graph would have kept the tensor itself: until the node
has run, or, where the graph is retained, as between the two parts of a split backward, until the graph goes. What is
kept may wait on the host (`pypar.recomputation.offload`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pypar.ops.calls import listening
from pypar.recomputation.again import Again, EnoughError, LastCall
from pypar.recomputation.environment import Environment
from pypar.recomputation.holdings import Holdings
from pypar.recomputation.kept import Part, Rule
from pypar.recomputation.offload import Moved, View, Visit
from pypar.recomputation.operators import Hearing, TorchCalls
from pypar.recomputation.saved import SAME, Result, Slot, Whole
from pypar.recomputation.saved_bytes import counters


def _place(x: Tensor) -> Any:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


class Region:
    """One call of a function, of which backward makes again what it needs.

    rule: what is kept, by default as the part says. visit: by which memory on the host comes back in time; None: there
    is none. meter: counts what the region holds, without parameters and what needs no gradient.
    """

    def __init__(
        self,
        part: Part,
        function: Callable[..., Any],
        rule: Rule | None = None,
        visit: Visit | None = None,
        meter: Holdings | None = None,
    ) -> None:
        self._rule: Rule = rule or part.kept
        self.name, self.checks = part.name, self._rule.checks
        self._part, self._function, self._visit, self._meter = part, function, visit, meter
        self._hears_torch = bool(self._rule.of_torch) and part.calls_torch is not False
        self._stays = part.memory()
        self._moves: dict[int, bool] = {}  # memory that is held: whether it moves
        self._pieces: dict[int, Moved] = {}  # what does
        self._slots: dict[int, weakref.ref[Slot]] = {}
        self._results: dict[int, tuple[int, Result]] = {}  # call -> (tensors saved before it, its result)
        self._num_saved = self._num_calls = 0
        self.last_call = LastCall()
        self.is_computing = False
        self._held: list[Whole] = []  # saved as they are, until the end of the forward
        self._constants: list[Tensor] = []  # likewise, and there anyway
        self._written: set[int] = set()  # memory into which torch's operators have written
        self._shown: list[Whole] = []  # kept results that the function returned, into which others may write

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result, for which autograd saves what the region keeps."""
        leaves, self._structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._inputs = [(Whole(x), x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        for x in tensors:
            # What needs no gradient, such as masks and tables of angles, is the caller's and given to other blocks too.
            if x.requires_grad:
                self._moves.setdefault(_memory(x), self._rule.moves_input(len(self._moves)))
        self._stays.update(_memory(x) for x in tensors if _memory(x) not in self._moves)
        self._environment = Environment.now(tensors)
        with self._heard_by(self, saved_tensors_hooks(self._save, self._getter())) as torch_calls:
            outputs = self._function(*args, **kwargs)
        if torch_calls is not None:
            self._part.calls_torch = self._part.calls_torch or torch_calls.has_heard
        self._close(tensors, outputs)
        return outputs

    def _getter(self) -> Callable[..., Tensor]:
        """What gives autograd a saved tensor."""
        return _get if self._visit is None else partial(_get_in, self._visit)

    def _is_constant(self, x: Tensor) -> bool:
        """Whether a tensor is saved as it is, as its memory is there anyway, or none."""
        return x.layout is not torch.strided or _memory(x) in self._stays or not x.numel()

    @contextlib.contextmanager
    def _heard_by(self, listener: Hearing, hooks: saved_tensors_hooks) -> Iterator[TorchCalls | None]:
        """Inside, the listener hears of operators, and the hooks of saved tensors."""
        with listening(listener), hooks:
            if not self._hears_torch:
                yield None
                return
            with TorchCalls(listener, self._rule.of_torch) as torch_calls:
                yield torch_calls

    def _save(self, x: Tensor) -> Whole | View | Slot:
        number, self._num_saved = self._num_saved, self._num_saved + 1
        if self._is_constant(x):
            self._constants.append(x)
            return Whole(x)
        if _memory(x) not in self._moves and self._rule.saves(number):
            self._moves[_memory(x)] = self._rule.moves_saved(number)
        if _memory(x) in self._moves:
            return self._hold(x)
        slot = Slot(self, x)
        self._slots[number] = weakref.ref(slot)
        source = self.last_call.inputs.get(_place(x))
        if source is None:
            self.last_call.is_enough = False
        else:
            self.last_call.slots[number] = source
        return slot

    def _hold(self, x: Tensor) -> Whole | View:
        """A tensor as it is kept, in memory that `_moves` knows."""
        offload = self._part.offload
        if offload is None or not self._moves[_memory(x)] or not offload.takes(x):
            self._held.append(Whole(x))
            return self._held[-1]
        if _memory(x) not in self._pieces:
            self._pieces[_memory(x)] = offload.moved(x)
        return View(self._pieces[_memory(x)], x)

    def call(self, name: str, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """Of the first forward: `pypar.ops.calls.Listener`."""
        if self.is_computing:
            return compute()
        outputs = self._computed(name, compute)
        places = {_place(x): i for i, x in enumerate(inputs) if isinstance(x, Tensor)}
        alive = [x for x in inputs if isinstance(x, Tensor)]
        self.last_call = LastCall(self._num_calls - 1, places, alive)
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
        if self._rule.keeps(self._num_calls, name):
            result = Result.of(name, outputs)
            self._results[self._num_calls] = self._num_saved, result
            moves = self._rule.moves_result(self._num_calls)
            memory = {_memory(x.x) for x in result.tensors}
            self._moves.update({each: moves for each in memory if each not in self._moves})
            self._written -= memory  # what was there before, and is gone
        self._num_calls += 1
        return outputs

    def written(self, x: Tensor) -> None:
        """An operator of torch has written into x."""
        self._written.add(_memory(x))

    def _is_as_it_was(self, result: Result) -> bool:
        """Whether nobody has written into an operator's result; else the operator runs again too."""
        return not any(x.is_written or _memory(x.x) in self._written for x in result.tensors)

    def _close(self, inputs: Sequence[Tensor], outputs: Any) -> None:
        """After the forward: nothing is held that the second one does not come to."""
        self._environment.forget_unused()
        last = max(self._slots, default=-1)
        self._results = {
            n: (at, result)
            for n, (at, result) in self._results.items()
            if at <= last and self._is_as_it_was(result)
        }
        if self.last_call.is_enough:
            self._results.pop(self.last_call.number, None)
        self.last_call.inputs, self.last_call.alive = {}, []
        kept = [x.x for _, result in self._results.values() for x in result.tensors]
        for _, result in self._results.values():
            result.held = [self._hold(x.x) if isinstance(x, Whole) else x for x in result.held]
        stay = {_memory(x) for x in kept} - set(self._pieces)
        self._shown = [Whole(x) for x in tree_leaves(outputs) if isinstance(x, Tensor) and _memory(x) in stay]
        if self._slots:
            # Each once: as the held tensor that it is, or in memory that moves.
            self._inputs = [
                (self._hold(x[0].x), x[1]) if type(x) is tuple and _memory(x[0].x) in self._moves else x
                for x in self._inputs
            ]
            self._constants += [x for x in inputs if _memory(x) in self._stays]
        else:
            self._inputs = []
        self._tell()
        self._stays.clear()
        self._moves.clear()
        self._held, self._constants = [], []

    def _tell(self) -> None:
        """What is held, to those who count; and that it may leave."""
        pieces, self._pieces = list(self._pieces.values()), {}
        self._counters = counters()
        for counter in self._counters:
            moving = [each.source for each in pieces if each.source is not None]
            counter.add_all([*(each.x for each in self._held), *moving, *self._constants])
        if self._meter is not None:
            for whole in self._held:
                self._meter.hold(whole, whole.x)
            for piece in pieces:
                piece.held_by(self._meter)
        if self._visit is not None:
            self._visit.close(pieces, self._counters, self._meter, stays=self._part.is_last)

    def kept(self, call: int) -> Result | None:
        """What is kept of a call: `pypar.recomputation.again.First`."""
        _, result = self._results.get(call, (0, None))
        return result

    def run_again(self) -> None:
        """Fill the slots that are still needed and empty; what is kept for that alone goes."""
        for shown in self._shown:
            shown.get()
        slots = {number: slot for number, ref in self._slots.items() if (slot := ref()) is not None}
        wanted = {number: slot for number, slot in slots.items() if slot.x is None}
        again = Again(self, dict(wanted))
        leaves = [x[0].get().detach().requires_grad_(x[1]) if type(x) is tuple else x for x in self._inputs]
        args, kwargs = tree_unflatten(leaves, self._structure)
        hooks = saved_tensors_hooks(again.save, lambda x: x)
        with (
            torch.enable_grad(),
            self._environment.restored(),
            contextlib.suppress(EnoughError),
            self._heard_by(again, hooks),
        ):
            self._function(*args, **kwargs)
        if again.wanted:
            raise RuntimeError(
                f"{self.name} saved {again.num_saved} tensors in backward where its forward saved "
                f"{self._num_saved}; {SAME}"
            )
        made = [(slot, slot.x) for slot in wanted.values() if slot.x is not None]
        for counter in self._counters:
            counter.add_all(x for _, x in made)
        if self._meter is not None:
            for slot, x in made:
                self._meter.hold(slot, x)
        self._inputs, self._results, self._shown = [], {}, []


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _get(saved: Whole | View | Slot) -> Tensor:
    return saved.get()


def _get_in(visit: Visit, saved: Whole | View | Slot) -> Tensor:
    visit.begin()
    return saved.get()
