"""A step whose blocks are all recomputed, watched: what each of them saves, what makes it, when it is needed."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from pypar.recomputation.kept import Kept, Part
from pypar.recomputation.offload import View, Visit
from pypar.recomputation.operators import COPIED, NAMES, overloads
from pypar.recomputation.plan.costs import INPUT, OTHER, BlockCosts, Piece
from pypar.recomputation.plan.simulate import ASK, CLOSE, RELEASE, Call, Event, Memory
from pypar.recomputation.region import Region
from pypar.recomputation.saved import Slot, Whole


class Clock:
    """Moments of what is computed: of the host's clock, on a GPU events of the stream."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self._is_gpu:
            return end - start
        end.synchronize()  # once in a run: a plan needs what was measured
        return start.elapsed_time(end) / 1e3


@dataclass
class _Seen:
    """One piece of storage of a call: the saved tensors in it, and what it is made by."""

    identity: int
    num_bytes: int
    numbers: list[int] = field(default_factory=list)
    until: int = 0  # calls that are over when the last of its saved tensors is there


@dataclass
class Record:
    """One call of a block.

    calls: of operators: (name, storage that it returned, the storage of results that would be kept as copies)
    moments: the forward's start, each operator's start and end, the forward's end
    """

    part: Part
    signature: Any
    visit: weakref.ref[Visit]
    seen: dict[int, _Seen] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    calls: list[tuple[str, list[int], Memory | None]] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    moments: list[Any] = field(default_factory=list)
    clock: Clock | None = None
    num_held: int = 0  # saved tensors that are still needed
    is_begun: bool = False


class Trace:
    """The calls of blocks since it began, and their events in order."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.events: list[Event] = []
        self.device = torch.device("cpu")  # of what the blocks compute with
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._num_storages = 0

    @property
    def is_over(self) -> bool:
        """Whether the backward of every call of it is over."""
        return bool(self.records) and all(record.is_begun and not record.num_held for record in self.records)

    @property
    def is_lost(self) -> bool:
        """Whether a call is gone that backward has not come to: its graph was dropped."""
        return any(not record.is_begun and record.visit() is None for record in self.records)

    @property
    def num_in_flight(self) -> int:
        """The most calls of one block at a time whose forward was over and whose backward was not."""
        held: dict[int, int] = {}  # tensors of a call
        most = 1
        for number, what, saved in self.events:
            if what == CLOSE:
                held[number] = saved
                blocks = Counter(self.records[n].signature for n, count in held.items() if count)
                most = max(most, *blocks.values(), 1)
            elif what == RELEASE:
                held[number] -= 1
        return most

    def identity(self, x: Tensor) -> int:
        """The number of the tensor's storage; what is allocated in its place later has another one."""
        storage = x.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None:  # the weak reference keeps the address from being used again
            known = self._storages[storage._cdata] = StorageWeakRef(storage), self._next()
        return known[1]

    def copies_of(self, tensors: Sequence[Tensor]) -> Memory:
        """Storage for copies of tensors, which only a plan would make."""
        return Memory(self._next(), sum(x.nbytes for x in tensors), ())

    def _next(self) -> int:
        self._num_storages += 1
        return self._num_storages


class TracedRegion(Region):
    """A region that keeps its inputs and tells a trace of its forward and of its backward."""

    def __init__(
        self, part: Part, function: Callable[..., Any], trace: Trace, signature: Any, visit: Visit
    ) -> None:
        super().__init__(part, function, Kept(of_torch=overloads(NAMES)), visit)
        self._trace, self._number = trace, len(trace.records)
        self._record = Record(part, signature, weakref.ref(visit))
        trace.records.append(self._record)
        self._numbers: dict[int, int] = {}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        record = self._record
        gpus = [x.device for x in _tensors((args, kwargs)) if x.is_cuda]
        self._trace.device = gpus[0] if gpus else self._trace.device
        record.clock = Clock(self._trace.device)
        for x in _tensors((args, kwargs)):
            if x.requires_grad and self._trace.identity(x) not in record.seen:
                self._see(x)
                record.inputs.append(self._trace.identity(x))
        record.moments.append(record.clock.now())
        return super().run(args, kwargs)

    def _see(self, x: Tensor) -> _Seen:
        identity = self._trace.identity(x)
        return self._record.seen.setdefault(identity, _Seen(identity, x.untyped_storage().nbytes()))

    def _getter(self) -> Callable[..., Tensor]:
        return partial(_asked, self._trace, self._number, self._numbers, super()._getter())

    def _save(self, x: Tensor) -> Whole | View | Slot:
        number, calls = self._num_saved, self._num_calls
        handle = super()._save(x)
        if not self._is_constant(x):
            seen = self._see(x)
            seen.numbers.append(number)
            seen.until = calls
            key = id(handle)
            self._numbers[key] = number
            self._record.num_held += 1
            weakref.finalize(handle, _released, self._trace, self._number, self._numbers, key)
        return handle

    def _computed(self, name: str, compute: Callable[[], Any]) -> Any:
        record = self._record
        assert record.clock is not None
        record.moments.append(record.clock.now())
        outputs = super()._computed(name, compute)
        record.moments.append(record.clock.now())
        tensors = _tensors(outputs)
        copied = self._trace.copies_of(tensors) if name in COPIED else None
        results = (
            [] if name in COPIED else [self._see(x).identity for x in tensors if not self._is_constant(x)]
        )
        record.calls.append((name, results, copied))
        record.written -= set(results)
        return outputs

    def written(self, x: Tensor) -> None:
        super().written(x)
        self._record.written.add(self._trace.identity(x))

    def _close(self, inputs: Sequence[Tensor], outputs: Any) -> None:
        record = self._record
        assert record.clock is not None
        record.moments.append(record.clock.now())
        for seen in (
            record.seen.values()
        ):  # a forward that runs again for nothing later ends before the last operator
            if seen.numbers and seen.numbers[-1] in self.last_call.slots:
                seen.until = self.last_call.number
        record.is_begun = not record.num_held
        self._trace.events.append((self._number, CLOSE, record.num_held))
        super()._close(inputs, outputs)


def _asked(
    trace: Trace, number: int, numbers: dict[int, int], get: Callable[[Any], Tensor], handle: Any
) -> Tensor:
    if id(handle) in numbers:
        trace.events.append((number, ASK, numbers[id(handle)]))
    trace.records[number].is_begun = True
    return get(handle)


def _released(trace: Trace, number: int, numbers: dict[int, int], key: int) -> None:
    trace.events.append((number, RELEASE, numbers.pop(key)))
    trace.records[number].num_held -= 1


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def call_of(record: Record, min_bytes: int) -> Call:
    """A record as the planner takes it."""
    pieces: list[Piece] = []
    memory: list[tuple[Memory, ...]] = []
    used: set[int] = set()

    def add(name: str, found: Sequence[_Seen], call: int | None, copied: Memory | None = None) -> None:
        used.update(each.identity for each in found)
        held = tuple(
            Memory(each.identity, each.num_bytes, tuple(each.numbers), each.num_bytes >= max(min_bytes, 1))
            for each in found
        )
        if copied:
            held += (copied,)
        saved = sum(each.num_bytes for each in held if each.numbers)
        extra = sum(each.num_bytes for each in held if not each.numbers)
        moved = sum(each.num_bytes for each in held if each.can_move)
        until = max((each.until for each in found if each.numbers), default=(call or 0) + 1)
        pieces.append(Piece(name, saved, extra, moved, call, until))
        memory.append(held)

    for identity in record.inputs:
        add(INPUT, [record.seen[identity]], None)
    for call, (name, results, copied) in enumerate(record.calls):
        own = [record.seen[identity] for identity in dict.fromkeys(results) if identity not in used]
        # What another one returned, an input, or what was written into later is not kept as this operator's.
        if copied or (own and len(own) == len(set(results)) and not record.written & set(results)):
            add(name, own, call, copied)
    for identity, seen in record.seen.items():
        if identity not in used and seen.numbers:
            add(OTHER, [seen], None)
    return Call(_costs(record, tuple(pieces)), tuple(memory), record.part.index)


def _costs(record: Record, pieces: tuple[Piece, ...]) -> BlockCosts:
    assert record.clock is not None
    seconds = [record.clock.seconds(a, b) for a, b in zip(record.moments, record.moments[1:], strict=False)]
    forward_s = sum(seconds)
    return BlockCosts(
        pieces,
        tuple(seconds[1::2]),
        tuple(seconds[0::2]),
        forward_s,
        2 * forward_s,  # two products of matrices for each of forward's
        record.part.is_last,
        record.part.name,
    )
