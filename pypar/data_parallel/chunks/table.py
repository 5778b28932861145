"""What a chunk's copy on the device may become: a table that every change is checked against."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What the device has of a chunk."""

    ABSENT = "absent"
    COMING = "coming"  # its memory is taken, the copy from the host is under way
    HELD = "held"  # as the host has it
    USED = "used"
    WRITTEN = "written"  # the host has older values
    GOING = "going"  # the copy to the host is under way


LEGAL = {
    State.ABSENT: {State.COMING, State.USED},  # used at once: it is created there
    State.COMING: {State.HELD},
    State.HELD: {State.USED, State.ABSENT},
    State.USED: {State.HELD, State.WRITTEN},
    State.WRITTEN: {State.USED, State.GOING},
    State.GOING: {State.HELD},
}


def changed(what: str, before: State, after: State) -> State:
    """The new state; AssertionError for a change that the table does not have."""
    assert after in LEGAL[before], f"{what} is {before.value} and cannot become {after.value}"
    return after
