"""When each rank starts to receive what its actions will need."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Message, Schedule


def receive_order(schedule: Schedule, rank: int) -> list[list[Message]]:
    """Which receives `rank` posts before each of its actions (one entry an action, plus nothing after the
    last).

    Before an action runs, the next activation and the next gradient that later actions need are posted too,
    so that they travel while it computes. Two ranks see their messages of one direction in one order, the
    sender's: whatever the sender sends earlier is posted earlier. So transports that match by order (NCCL)
    work like those that match by tag.
    """
    others = [source for source in range(schedule.num_ranks) if source != rank]
    order = {source: _sent(schedule, source, rank) for source in others}
    place = {message: i for messages in order.values() for i, message in enumerate(messages)}
    posted = dict.fromkeys(order, 0)
    receives: list[list[Message]] = []
    for wanted in _wanted(schedule, rank):
        now: list[Message] = []
        for message in wanted:
            source = schedule.placement[message.sender]
            now += order[source][posted[source] : place[message] + 1]
            posted[source] = max(posted[source], place[message] + 1)
        receives.append(now)
    return receives


def _wanted(schedule: Schedule, rank: int) -> list[list[Message]]:
    """What each action needs from other ranks, and the next message of each kind after it."""
    upcoming: dict[str, Message] = {}
    wanted: list[list[Message]] = []
    for action in reversed(schedule.lists[rank]):
        message = schedule.needed_by(action)
        if message is None or schedule.placement[message.sender] == rank:
            wanted.append(list(upcoming.values()))
        else:
            wanted.append([message, *upcoming.values()])
            upcoming[message.kind] = message
    return wanted[::-1]


def _sent(schedule: Schedule, source: int, target: int) -> list[Message]:
    """All messages from rank `source` to rank `target`, in the order of sending."""
    messages = (schedule.sent_by(action) for action in schedule.lists[source])
    return [m for m in messages if m is not None and schedule.placement[m.receiver] == target]
