"""The protocol of csrc/shm/segment.h, by enumeration: every interleaving of 2 and 3 ranks and 3 steps, on a memory
in which stores become visible late and out of order unless they are ordered, and loads run early unless they are
held back.

A model, written apart from the code: it shows that the rules which the header states are enough, and that each one is
needed, since without it the enumeration finds the fault.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Wait:
    """Until `ready` of the word's value is true. acquire: later loads are not done before."""

    word: str
    ready: tuple[int, ...]
    acquire: bool = True


@dataclass(frozen=True)
class Store:
    """release: visible to others only after all earlier stores of this rank."""

    word: str
    value: int
    release: bool = False


@dataclass(frozen=True)
class Read:
    word: str
    expected: int


class FaultError(Exception):
    pass


def explore(programs):
    """Visits every state. FaultError, with the history, where a read sees something else than expected or nobody
    can go on.

    A state: per rank how far it is and which reads it did early; the stores that each has made and others do not see
    yet; the memory.
    """
    ranks = range(len(programs))
    start = (tuple((0, frozenset()) for _ in ranks), tuple(() for _ in ranks), frozenset())
    seen, stack = {start}, [(start, ())]
    while stack:
        state, history = stack.pop()
        following = list(_moves(programs, *state))
        if not following and any(pc < len(programs[r]) for r, (pc, _) in enumerate(state[0])):
            raise FaultError(f"nobody can go on after {history}")
        for what, new in following:
            if what is not None and what[0] == "wrong":
                raise FaultError(f"{what[1]} after {history}")
            if new not in seen:
                seen.add(new)
                stack.append((new, (*history, what)))
    return len(seen)


def _moves(programs, places, pending, memory):
    values = dict(memory)
    for rank, program in enumerate(programs):
        for i, (word, value, release) in enumerate(pending[rank]):
            # A store may pass earlier ones to other words; never one to its own, never if it is a release.
            earlier = pending[rank][:i]
            if release and earlier or any(w == word for w, _, _ in earlier):
                continue
            kept = (*earlier, *pending[rank][i + 1 :])
            changed = frozenset({**values, word: value}.items())
            yield (rank, "visible", word, value), (places, _set(pending, rank, kept), changed)
        pc, early = places[rank]
        for at in range(pc, len(program)):
            held_back = any(
                not (isinstance(program[i], Wait) and not program[i].acquire)
                for i in range(pc, at)
                if i not in early
            )
            if at in early:
                continue
            if at > pc and (held_back or not isinstance(program[at], Read)):
                break
            move = _execute(program[at], rank, values, pending)
            if move is None:
                continue
            what, new_pending = move
            done = early | {at}
            after = pc
            while after in done:
                after += 1
            place = (after, frozenset(i for i in done if i >= after))
            yield what, (_set(places, rank, place), new_pending, memory)


def _execute(instruction, rank, values, pending):
    """(what happened, stores under way), None if it has to wait."""
    own = [value for word, value, _ in pending[rank] if word == instruction.word]
    value = own[-1] if own else values.get(instruction.word, 0)
    if isinstance(instruction, Store):
        store = (instruction.word, instruction.value, instruction.release)
        return (rank, "store", *store), _set(pending, rank, (*pending[rank], store))
    if isinstance(instruction, Wait):
        return ((rank, "saw", instruction.word, value), pending) if value in instruction.ready else None
    if value != instruction.expected:
        return (
            "wrong",
            f"rank {rank} reads {instruction.word} = {value}, not {instruction.expected}",
        ), pending
    return (rank, "read", instruction.word, value), pending


def _set(items, index, item):
    return (*items[:index], item, *items[index + 1 :])


STEPS = 3


def steps(
    num_ranks, *, release=True, acquire=True, enter=True, buffers=2, flag=lambda step: step, first_reader=0
):
    """What a rank does in STEPS steps: enter, write, leave, read the others. Ranks before `first_reader` only write."""

    def reached(step):
        return (
            tuple(sorted({flag(s) for s in range(step, STEPS + 1)}))
            if flag(STEPS) == STEPS
            else (flag(step),)
        )

    programs = []
    for rank in range(num_ranks):
        others = [r for r in range(num_ranks) if r != rank]
        program = []
        for step in range(1, STEPS + 1):
            if enter:
                program += [Wait(f"flag {r}", reached(step - 1)) for r in others]
            program.append(Store(f"buffer {rank} {step % buffers}", step))
            program.append(Store(f"flag {rank}", flag(step), release))
            if rank < first_reader:
                continue
            for r in others:
                program += [
                    Wait(f"flag {r}", reached(step), acquire),
                    Read(f"buffer {r} {step % buffers}", step),
                ]
        programs.append(program)
    return programs


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("first_reader", [0, 1])
def test_the_protocol_holds(num_ranks, first_reader):
    """first_reader 1: a broadcast from rank 0, which reads nothing and may run ahead."""
    assert explore(steps(num_ranks, first_reader=first_reader)) > 100


@pytest.mark.parametrize(
    ("fault", "planted"),
    {
        "reads buffer": {"release": False},
        "reads buffer ": {"acquire": False},
        "reads buffer  ": {"buffers": 1},
        "reads buffer   ": {"enter": False, "first_reader": 1},
        "nobody can go on": {"flag": lambda step: step % 2},
    }.items(),
    ids=["no release", "no acquire", "one buffer", "writes without entering", "one reusable flag"],
)
def test_every_rule_is_needed(fault, planted):
    with pytest.raises(FaultError, match=fault.strip()):
        explore(steps(2, **planted))


def sleep(fence_of_publisher, fence_of_sleeper):
    """One rank publishes its flag, the other goes to sleep for it: the futex part.

    The model's fences are waits for one's own stores to be visible. The operating system looks at the word again
    before it puts a rank to sleep, so the last look of the sleeper and going to sleep are one.
    """
    states = set()

    def visit(publisher, sleeper, flag, flag_visible, sleepers, sleepers_visible, asleep):
        state = (publisher, sleeper, flag, flag_visible, sleepers, sleepers_visible, asleep)
        if state in states:
            return
        states.add(state)
        moved = False

        def go(**changes):
            nonlocal moved
            moved = True
            names = ("publisher", "sleeper", "flag", "flag_visible", "sleepers", "sleepers_visible", "asleep")
            visit(**{**dict(zip(names, state, strict=True)), **changes})

        if flag and not flag_visible:
            go(flag_visible=True)
        if sleepers and not sleepers_visible:
            go(sleepers_visible=True)
        if publisher == 0:
            go(publisher=1, flag=True)
        elif publisher == 1 and (flag_visible or not fence_of_publisher):
            go(publisher=2, asleep=asleep and not sleepers_visible)  # wakes if it sees a sleeper
        if sleeper == 0:
            go(sleeper=1, sleepers=True)
        elif sleeper == 1 and (sleepers_visible or not fence_of_sleeper):
            go(sleeper=2, asleep=not flag_visible)
        if not moved and asleep:
            raise FaultError("asleep for ever")

    visit(0, 0, False, False, False, False, False)
    return len(states)


def test_no_wake_up_is_lost():
    assert sleep(True, True) > 5


@pytest.mark.parametrize("fences", [(False, True), (True, False)])
def test_both_fences_are_needed(fences):
    with pytest.raises(FaultError, match="asleep for ever"):
        sleep(*fences)
