"""Carries what passes between the stages of a pipeline while the ranks compute.

A message is a header (header.py) and then its tensors. An edge is one direction between two neighbouring
stages. Its receives are posted before it is known what will come, with room for the header and for the
largest tensors that the edge carried in the run before, which both of its ends know. So in every run but the
first a message is one transfer, which goes on while both ranks compute. What is larger than the room follows
the header in a transfer of its own. So any shapes are right, in every microbatch, and only growth costs time.

On a GPU the header goes over the host, and the tensors always follow it: the host knows the shapes before
the device has the numbers, so nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm.collectives import Handle
from pypar.comm.point_to_point import receive_start, send_start
from pypar.mesh import Axis
from pypar.pipeline_parallel.action import ACTIVATION, Action, Message, Place, Schedule
from pypar.pipeline_parallel.messages.header import HEADER_BYTES, Header, Value, decode, encode, pack, unpack

Edge = tuple[str, Place]  # kind of message, and the stage that receives it


class StageFailedError(Exception):
    """Raised by `take` where the stage that was to send has failed; `header` says why."""

    def __init__(self, header: Header) -> None:
        super().__init__(header.failure)
        self.header = header


class Edges:
    """What the two ends of each edge know of each other, from one run of a schedule to the next."""

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self.axis = axis
        self.device = device
        self.host_axis = _host_axis(axis, device)
        self.room: dict[Edge, int] = {}  # bytes of tensors that travel with the header
        self._largest: dict[Edge, int] = {}  # bytes of tensors in one message of this run
        self._free: dict[int, list[Tensor]] = {}  # buffers to send from, by size
        self._encoded: dict[Header, Tensor] = {}
        self._decoded: dict[bytes, Header] = {}

    def carries(self, edge: Edge, num_bytes: int) -> bool:
        """Notes that a message of so many bytes of tensors goes over the edge; whether they fit in its room."""
        self._largest[edge] = max(num_bytes, self._largest.get(edge, 0))
        return num_bytes <= self.room.get(edge, 0)

    def settle(self) -> None:
        """At the end of a run: the room of the next one."""
        if self.device.type == "cpu":
            self.room.update(self._largest)
        self._largest = {}
        sizes = {HEADER_BYTES + room for room in self.room.values()}
        self._free = {size: buffers for size, buffers in self._free.items() if size in sizes}

    def buffer(self, edge: Edge) -> Tensor:
        """uint8 on the host for a header and the edge's room, to send from."""
        size = HEADER_BYTES + self.room.get(edge, 0)
        free = self._free.setdefault(size, [])
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """A buffer that has been sent may be used again."""
        self._free.setdefault(len(buffer), []).append(buffer)

    def encoded(self, header: Header) -> Tensor:
        """The header as it is sent; the same ones are sent again and again."""
        if header not in self._encoded:
            _keep_few(self._encoded)
            self._encoded[header] = encode(header)
        return self._encoded[header]

    def decoded(self, header: Tensor) -> Header:
        """The opposite of `encoded`."""
        text = header.numpy().tobytes()
        if text not in self._decoded:
            _keep_few(self._decoded)
            self._decoded[text] = decode(text)
        return self._decoded[text]


def _keep_few(cache: dict) -> None:  # type: ignore[type-arg]
    if len(cache) >= 256:  # sequences of many lengths make many headers
        cache.clear()


class Mailbox:
    """The messages of one rank during one run of a schedule.

    `post` starts receives, `send` starts a send and does not wait for it, `take` gives what has arrived or
    waits for it. Messages between two stages of this rank are handed over as they are.
    """

    def __init__(self, edges: Edges, schedule: Schedule) -> None:
        self._edges = edges
        self._schedule = schedule
        self._arriving: dict[Message, Handle] = {}
        self._opened: dict[
            Message, tuple[Header, Handle, int]
        ] = {}  # the header was read; the tensors arrive
        self._leaving: dict[Message, tuple[Tensor, list[Handle]]] = {}  # and the buffer of the first transfer
        self._local: dict[Message, tuple[Header, Value]] = {}
        self._settled: set[Message] = set()  # taken or sent
        self.waited_s = 0.0  # in `take`, for what had not arrived

    def post(self, messages: Sequence[Message]) -> None:
        """Starts to receive `messages`."""
        for message in messages:
            size = HEADER_BYTES + self._edges.room.get(_edge(message), 0)
            self._arriving[message] = self._receive(size, message, torch.device("cpu"), late=False)

    def take(self, message: Message) -> tuple[Header, Value]:
        """The header and the tensors of `message`, after waiting for them where they have not arrived."""
        self._settled.add(message)
        if self._rank(message.sender) == self._edges.axis.rank:
            header, value = self._local.pop(message)
        else:
            begin = time.perf_counter()
            header, value = self._taken(message)
            self.waited_s += time.perf_counter() - begin
        if header.failure:
            raise StageFailedError(header)
        return header, value

    def _taken(self, message: Message) -> tuple[Header, Value]:
        source = self._rank(message.sender)
        for posted in list(self._arriving):  # in the order of sending, which NCCL matches by
            if message in self._opened:
                break
            if self._rank(posted.sender) == source:
                self._opened[posted] = self._open(posted)
        header, tensors, begin = self._opened.pop(message)
        return header, unpack(header, tensors.wait(), begin)

    def _open(self, message: Message) -> tuple[Header, Handle, int]:
        """The header, after waiting for it, and what holds the tensors from which byte on."""
        arriving = self._arriving.pop(message)
        header = self._edges.decoded(arriving.wait()[:HEADER_BYTES])
        num_bytes = header.offsets[-1]
        if self._edges.carries(_edge(message), num_bytes):
            return header, arriving, HEADER_BYTES
        return header, self._receive(num_bytes, message, self._edges.device, late=True), 0

    def send(self, message: Message, header: Header, value: Value = ()) -> None:
        """Starts to send `value`, which `header` describes; another rank gets it as it is now."""
        self._settled.add(message)
        value = tuple(None if x is None else x.detach() for x in value)
        if self._rank(message.receiver) == self._edges.axis.rank:
            self._local[message] = (header, value)
            return
        encoded = self._edges.encoded(header)  # refuses what it cannot say before anything is sent
        first, num_bytes = self._edges.buffer(_edge(message)), header.offsets[-1]
        first[:HEADER_BYTES] = encoded
        if self._edges.carries(_edge(message), num_bytes):
            pack(value, header, first, HEADER_BYTES)
            handles = [self._send(first, message, late=False)]
        else:
            rest = torch.empty(num_bytes, dtype=torch.uint8, device=self._edges.device)
            pack(value, header, rest)
            handles = [self._send(first, message, late=False), self._send(rest, message, late=True)]
        self._leaving[message] = (first, handles)

    def refuse(self, action: Action, header: Header) -> None:
        """In place of `action`: takes what it needs, where it is not taken, and sends a failure in place of a result.

        So nobody waits for this rank, and all that depended on the action learn why it was not done.
        """
        needed, made = self._schedule.needed_by(action), self._schedule.sent_by(action)
        if needed is not None and needed not in self._settled:
            with contextlib.suppress(StageFailedError):
                self.take(needed)
        if made is not None and made not in self._settled:
            self.send(made, header)

    def release(self, message: Message) -> None:
        """Lets go of a sent message; does not block once the receiver has it."""
        if message in self._leaving:
            first, handles = self._leaving.pop(message)
            for handle in handles:
                handle.wait()
            self._edges.give_back(first)

    def finish(self) -> None:
        """Completes all sends, and the run."""
        for message in list(self._leaving):
            self.release(message)
        self._edges.settle()

    def _send(self, x: Tensor, message: Message, *, late: bool) -> Handle:
        axis = self._axis_of(x.device)
        return send_start(x, self._rank(message.receiver), axis, self._tag(message, late))

    def _receive(self, num_bytes: int, message: Message, device: torch.device, *, late: bool) -> Handle:
        source, axis = self._rank(message.sender), self._axis_of(device)
        return receive_start((num_bytes,), torch.uint8, device, source, axis, self._tag(message, late))

    def _axis_of(self, device: torch.device) -> Axis:
        return self._edges.host_axis if device.type == "cpu" else self._edges.axis

    def _rank(self, place: Place) -> int:
        return self._schedule.placement[place]

    def _tag(self, message: Message, late: bool) -> int:
        """A number that no other transfer of the same run has; a microbatch goes along one path."""
        number = message.microbatch * self._schedule.num_stages + message.stage
        return 4 * number + 2 * (message.kind != ACTIVATION) + late


def _edge(message: Message) -> Edge:
    return message.kind, message.receiver


def _host_axis(axis: Axis, device: torch.device) -> Axis:
    """An axis of the same ranks that carries tensors on the host: the axis itself where its group does."""
    if axis.group is None or device.type == "cpu" or "cpu:" in dist.get_backend_config(axis.group):
        return axis
    group = dist.new_group(list(axis.ranks), backend="gloo", use_local_synchronization=True)
    return Axis.of(group, f"{axis.name} headers")
