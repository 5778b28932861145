"""Carries activations and gradients between the stages of a pipeline while the ranks compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pypar.comm.collectives import Handle
from pypar.comm.point_to_point import receive_start, send_start
from pypar.mesh import Axis
from pypar.pipeline_parallel.action import (
    ACTIVATION,
    Action,
    Message,
    Schedule,
    needed_by,
    sent_by,
    stage_ranks,
)


def receive_plan(schedule: Schedule, rank: int) -> list[list[Message]]:
    """Which receives `rank` posts before each of its actions (one entry an action, plus nothing after the
    last).

    Before an action runs, the next activation and the next gradient that later actions need are posted too,
    so that they travel while it computes. Two ranks see their messages of one direction in one order, the
    sender's: whatever the sender sends earlier is posted earlier. So transports that match by order (NCCL)
    work like those that match by tag.
    """
    ranks = stage_ranks(schedule)
    others = [source for source in range(len(schedule)) if source != rank]
    order = {source: _sent(schedule, source, rank, ranks) for source in others}
    place = {message: i for messages in order.values() for i, message in enumerate(messages)}
    posted = dict.fromkeys(order, 0)
    plan: list[list[Message]] = []
    for wanted in _wanted(schedule[rank], ranks, rank):
        now: list[Message] = []
        for message in wanted:
            source = ranks[message.sender]
            now += order[source][posted[source] : place[message] + 1]
            posted[source] = max(posted[source], place[message] + 1)
        plan.append(now)
    return plan


def _wanted(actions: Sequence[Action], ranks: dict[int, int], rank: int) -> list[list[Message]]:
    """What each action needs from other ranks, and the next message of each kind after it."""
    upcoming: dict[str, Message] = {}
    wanted: list[list[Message]] = []
    for action in reversed(actions):
        message = needed_by(action, len(ranks))
        if message is None or ranks[message.sender] == rank:
            wanted.append(list(upcoming.values()))
        else:
            wanted.append([message, *upcoming.values()])
            upcoming[message.kind] = message
    return wanted[::-1]


def _sent(schedule: Schedule, source: int, target: int, ranks: dict[int, int]) -> list[Message]:
    """All messages from rank `source` to rank `target`, in the order of sending."""
    messages = (sent_by(action, len(ranks)) for action in schedule[source])
    return [message for message in messages if message is not None and ranks[message.stage] == target]


class Mailbox:
    """The messages of one rank during one run of a schedule.

    `post` starts receives, `send` starts a send and does not wait for it, `take` gives a tensor that has
    arrived or waits for it. Messages between two stages of this rank are handed over as they are. A sent
    tensor must not be rewritten before `release` or `finish`.
    """

    def __init__(
        self,
        axis: Axis,
        ranks: dict[int, int],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._axis = axis
        self._ranks = ranks
        self._shape = tuple(shape)
        self._dtype = dtype
        self._device = device
        self._arriving: dict[Message, Handle] = {}
        self._leaving: dict[Message, Handle] = {}
        self._local: dict[Message, Tensor] = {}

    def post(self, messages: Sequence[Message]) -> None:
        """Starts to receive `messages`."""
        for message in messages:
            source = self._ranks[message.sender]
            self._arriving[message] = receive_start(
                self._shape, self._dtype, self._device, source, self._axis, tag=self._tag(message)
            )

    def take(self, message: Message) -> Tensor:
        """The tensor of `message`, after waiting for it where it has not arrived."""
        if self._ranks[message.sender] == self._axis.rank:
            return self._local.pop(message)
        return self._arriving.pop(message).wait()

    def send(self, message: Message, tensor: Tensor) -> None:
        """Starts to send `tensor`; it is kept alive until `release` or `finish`."""
        tensor = tensor.detach().contiguous()
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"stage {message.sender} made a {message.kind} of shape {tuple(tensor.shape)} and "
                f"{tensor.dtype} for stage"
                f" {message.stage}, but the pipeline was told activation_shape={self._shape} and "
                f"activation_dtype="
                f"{self._dtype}; make the stages and these arguments agree"
            )
        target = self._ranks[message.stage]
        if target == self._axis.rank:
            self._local[message] = tensor
        else:
            self._leaving[message] = send_start(tensor, target, self._axis, tag=self._tag(message))

    def release(self, message: Message) -> None:
        """Lets go of a sent tensor; does not block once the receiver has it."""
        handle = self._leaving.pop(message, None)
        if handle is not None:
            handle.wait()

    def finish(self) -> None:
        """Completes all sends."""
        for message in list(self._leaving):
            self.release(message)

    def _tag(self, message: Message) -> int:
        """A number that no other message of the same run has."""
        return 2 * (message.microbatch * len(self._ranks) + message.stage) + (message.kind != ACTIVATION)
