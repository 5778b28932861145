"""What is on the device at each moment of a step, for given choices: the step's events, played with them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pypar.recomputation.plan.costs import INPUT, OFFLOAD, RECOMPUTE, BlockCosts

CLOSE, ASK, RELEASE = "close", "ask", "release"


@dataclass(frozen=True)
class Memory:
    """One piece of storage: which, its bytes, the numbers of the saved tensors in it, whether it can move.

    Two blocks that keep parts of one have it with the same identity.
    """

    identity: int
    num_bytes: int
    numbers: tuple[int, ...]
    can_move: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a block: its costs, the memory of each of its pieces, the block's place in its model."""

    block: BlockCosts
    memory: tuple[tuple[Memory, ...], ...]
    index: int


Event = tuple[
    int, str, int
]  # (the call's number, what happens, the saved tensor's number; CLOSE: how many there are)


@dataclass
class _Held:
    """Memory that a call keeps: for saved tensors, and for a forward that runs again."""

    memory: Memory
    numbers: set[int]
    for_again: bool
    moves: bool = False
    place: object = None  # on the device; None: on the host


class _Device:
    """Pieces of storage by how many hold them."""

    def __init__(self) -> None:
        self._holders: Counter[object] = Counter()
        self.now = self.peak = 0

    def hold(self, place: object, num_bytes: int) -> None:
        self.now += 0 if self._holders[place] else num_bytes
        self._holders[place] += 1

    def drop(self, place: object, num_bytes: int) -> None:
        self._holders[place] -= 1
        self.now -= 0 if self._holders[place] else num_bytes

    def measure(self) -> None:
        self.peak = max(self.peak, self.now)


class _Step:
    def __init__(self, calls: Sequence[Call], choices: Sequence[Sequence[str]], num_leaving: int) -> None:
        self.device, self.host, self.host_peak = _Device(), 0, 0
        self._calls, self._choices, self._num_leaving = calls, choices, num_leaving
        self._held: dict[int, list[_Held]] = {}
        self._again: dict[int, list[_Held]] = {}  # made again once it is asked for
        self._begun: set[int] = set()
        self._leaving: deque[tuple[int, list[_Held]]] = deque()

    def close(self, number: int) -> None:
        call, held = self._calls[number], []
        again: list[_Held] = []
        chosen = list(zip(call.block.pieces, call.memory, self._choices[number], strict=True))
        made = [piece.until for piece, _, choice in chosen if choice == RECOMPUTE and piece.saved_bytes]
        until = max(made, default=None)
        for piece, memory, choice in chosen:
            serves = until is not None and (
                piece.name == INPUT or (piece.call is not None and piece.call < until)
            )
            for each in memory:
                if choice == RECOMPUTE:
                    again += [_Held(each, set(each.numbers), False)] if each.numbers else []
                elif each.numbers or serves:
                    moves = choice == OFFLOAD and each.can_move and not call.block.stays
                    held.append(_Held(each, set(each.numbers), serves, moves, each.identity))
                    self.device.hold(each.identity, each.num_bytes)
        self.device.measure()
        self._held[number], self._again[number] = held, again
        moving = [each for each in held if each.moves]
        self.host += sum(each.memory.num_bytes for each in moving)
        self.host_peak = max(self.host_peak, self.host)
        self._leaving.append((number, moving))
        if len(self._leaving) > self._num_leaving:
            for gone in self._leaving.popleft()[1]:
                if gone.numbers or gone.for_again:
                    self.device.drop(gone.place, gone.memory.num_bytes)
                    gone.place = None

    def ask(self, number: int, saved: int) -> None:
        if number not in self._begun:
            self._begin(number)
        if any(saved in each.numbers for each in self._again[number]):
            for each in self._again[number]:
                if each.numbers:
                    each.place = (number, each.memory.identity)
                    self.device.hold(each.place, each.memory.num_bytes)
            self.device.measure()
            self._held[number] += self._again[number]
            self._again[number] = []
            for each in self._held[number]:
                each.for_again = False
                self._drop_unused(each, was_used=not each.numbers)

    def _begin(self, number: int) -> None:
        """Backward comes to a call: what is on its way stays, what has left comes back, of the one before too."""
        self._begun.add(number)
        self._leaving = deque((n, [] if n == number else moving) for n, moving in self._leaving)
        before = number - 1
        calls = [number]
        if (
            before >= 0
            and self._calls[before].index < self._calls[number].index
            and before not in self._begun
        ):
            calls.append(before)
        for each in (each for n in calls for each in self._held.get(n, ())):
            if each.place is None and (each.numbers or each.for_again):
                each.place = ("back", number, each.memory.identity)
                self.device.hold(each.place, each.memory.num_bytes)
        self.device.measure()

    def release(self, number: int, saved: int) -> None:
        for each in (*self._held.get(number, ()), *self._again.get(number, ())):
            if saved in each.numbers:
                each.numbers.discard(saved)
                self._drop_unused(each, was_used=True)

    def _drop_unused(self, each: _Held, *, was_used: bool) -> None:
        if was_used and not each.numbers and not each.for_again and each.place != "gone":
            if each.place is not None:
                self.device.drop(each.place, each.memory.num_bytes)
            self.host -= each.memory.num_bytes if each.moves else 0
            each.place = "gone"


def simulate(
    calls: Sequence[Call], events: Sequence[Event], choices: Sequence[Sequence[str]], num_leaving: int = 1
) -> Mapping[str, int]:
    """The most bytes at once on the "device" and, no more than, on the "host".

    choices: for each call, one for each of its pieces.
    """
    step = _Step(calls, choices, num_leaving)
    for number, what, saved in events:
        if what == CLOSE:
            step.close(number)
        elif what == ASK:
            step.ask(number, saved)
        else:
            step.release(number, saved)
    return {"device": step.device.peak, "host": step.host_peak}
