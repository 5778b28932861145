"""Whether the lists of a schedule come to their end, with messages of which so many may be under way."""

from __future__ import annotations

from collections import Counter

from pypar.pipeline_parallel.action import Message, Place, Schedule
from pypar.pipeline_parallel.messages.receive_order import receive_order
from pypar.pipeline_parallel.validate.fault import fault

Edge = tuple[str, Place]  # kind of message, and the stage that receives it


def check_runs(schedule: Schedule, buffers: int | None = None) -> None:
    """ValueError with the actions at which the ranks are stuck.

    buffers: how many messages that an edge's receiver has not taken may be sent before its sender waits. None: any
        number, as the runtime, which sends without waiting. 0: none; a sender waits until the receive is posted,
        which happens as the runtime does it, while the action before computes (`receive_order`).
    """
    run = _Run(schedule, buffers)
    if not run.is_stuck():
        return
    stuck = {
        rank: position
        for rank, (position, actions) in enumerate(zip(run.positions, schedule.lists, strict=True))
        if position < len(actions)
    }
    waits = "; ".join(
        f"rank {rank}, position {position}: {schedule.lists[rank][position]} waits for {run.awaited(rank)}"
        for rank, position in stuck.items()
    )
    sends = (
        ""
        if buffers is None
        else f" with {buffers} messages under way on an edge"
        if buffers
        else " with sends that wait"
    )
    raise fault(
        schedule,
        f"the pipeline schedule deadlocks{sends}: {waits}; run what is waited for before what waits for it",
        *stuck.items(),
    )


def buffers_needed(schedule: Schedule) -> int:
    """The smallest `buffers` with which a valid schedule comes to its end."""
    buffers = 0
    while _Run(schedule, buffers).is_stuck():
        buffers += 1
    return buffers


class _Run:
    """Runs the lists without time: a rank goes on while what it needs has been sent and what it sends has room."""

    def __init__(self, schedule: Schedule, buffers: int | None) -> None:
        self.positions = [0] * schedule.num_ranks
        self._schedule, self._buffers = schedule, buffers
        self._sent: set[Message | None] = {None}
        self._leaving: list[list[Message]] = [
            [] for _ in schedule.lists
        ]  # of a rank's last action, not yet sent
        self._under_way: Counter[Edge] = Counter()
        self._posted: set[Message] = set()
        self._receives = (
            [receive_order(schedule, rank) for rank in range(schedule.num_ranks)] if buffers == 0 else []
        )

    def is_stuck(self) -> bool:
        """Runs all ranks until none can go on; whether any list is not at its end then."""
        while any([self._advance(rank) for rank in range(self._schedule.num_ranks)]):
            pass
        return self.positions != [len(actions) for actions in self._schedule.lists]

    def awaited(self, rank: int) -> str:
        """What a stuck rank waits for, in words."""
        if self._leaving[rank]:
            message = self._leaving[rank][0]
            return (
                f"room to send the {message.kind} of microbatch {message.microbatch} to stage {message.stage}"
            )
        message = next(m for m in self._needed(rank) if m not in self._sent and m is not None)
        return f"the {message.kind} of microbatch {message.microbatch} from stage {message.sender[1]}"

    def _together(self, rank: int) -> int:
        return 1 + ((rank, self.positions[rank]) in self._schedule.pairs)

    def _needed(self, rank: int) -> list[Message | None]:
        first = self.positions[rank]
        actions = self._schedule.lists[rank][first : first + self._together(rank)]
        return [self._schedule.needed_by(action) for action in actions]

    def _advance(self, rank: int) -> bool:
        """Runs a rank until it waits; whether it did anything."""
        moved = False
        while self.positions[rank] < len(self._schedule.lists[rank]):
            first, count = self.positions[rank], self._together(rank)
            if not self._leaving[rank]:
                if self._receives:
                    for messages in self._receives[rank][first : first + count]:
                        moved |= not self._posted.issuperset(messages)
                        self._posted.update(messages)
                needed = self._needed(rank)
                if not self._sent.issuperset(needed):
                    return moved
                self._under_way.subtract(_edge(message) for message in needed if message is not None)
                self._leaving[rank] = self._made(rank, first, count)
                moved = True
            while self._leaving[rank] and self._has_room(self._leaving[rank][0]):
                message = self._leaving[rank].pop(0)
                self._sent.add(message)
                self._under_way[_edge(message)] += 1
                moved = True
            if self._leaving[rank]:
                return moved
            self.positions[rank] += count
        return moved

    def _made(self, rank: int, first: int, count: int) -> list[Message]:
        made = [self._schedule.sent_by(a) for a in self._schedule.lists[rank][first : first + count]]
        found = [message for message in made if message is not None]
        placement = self._schedule.placement
        self._sent.update(message for message in found if placement[message.receiver] == rank)
        return [message for message in found if placement[message.receiver] != rank]

    def _has_room(self, message: Message) -> bool:
        if self._buffers == 0:
            return message in self._posted
        return self._buffers is None or self._under_way[_edge(message)] < self._buffers


def _edge(message: Message) -> Edge:
    return message.kind, message.receiver
