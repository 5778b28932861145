"""Runs a pipeline schedule: the same code for every schedule, and for any number of ranks including one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pypar.mesh import Axis
from pypar.pipeline_parallel.action import (
    ACTIVATION,
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Message,
    Place,
    Schedule,
)
from pypar.pipeline_parallel.forward_only import forwards_of
from pypar.pipeline_parallel.messages.header import Header, Value, as_value, describe
from pypar.pipeline_parallel.messages.mailbox import Edges, Mailbox, StageFailedError
from pypar.pipeline_parallel.messages.receive_order import receive_order
from pypar.pipeline_parallel.stage import InFlight, Stage, received_by
from pypar.pipeline_parallel.trained import check_runs_here
from pypar.pipeline_parallel.validate import validate


class Accumulation(Protocol):
    """What `step` needs of gradient buckets: a context in which backward starts no reduction."""

    def accumulate(self) -> AbstractContextManager[Any]: ...


class PipelineRuntime:
    """Trains the stages of one rank by a schedule.

        class Stage(nn.Module):                          # of a model that passes on a hidden state and a mask
            def forward(self, received, microbatch):
                hidden, mask = (self.embed(microbatch.tokens), microbatch.mask) if received is None else received
                hidden = self.layers(hidden, mask)
                return self.loss(hidden, microbatch.targets) if self.is_last else (hidden, mask)

        schedule = schedules.build("one_f_one_b", mesh.pp.size, num_microbatches)
        runtime = PipelineRuntime(Stage(mesh.pp.rank), mesh.pp, schedule)
        losses = runtime.step(microbatches)              # gradients are in the parameters' .grad

    A stage is called as stage(received, microbatch). `received` is None on the first stage, else what the
    previous stage returned: a tensor, or a tuple of tensors and None, of any shapes and dtypes, which may
    differ from microbatch to microbatch (only changes of them cost time, see mailbox.py). The last stage
    returns the loss, a scalar that is already scaled.

    Where a stage fails, its rank goes through the rest of the schedule without computing, so that no rank
    waits for another, and raises its error then; the ranks that depended on it raise the same sentence.

    Args:
        stages: this rank's stage, or {stage: callable} where the schedule gives it several, or
            {(path, stage): callable} where it has several paths. The copies of a stage on several paths are
            kept equal by the caller, who also adds up their gradients.
        axis: the pp axis; its size is the number of lists in `schedule`. Size 1 needs no process group.
        schedule: of kinds F, B, I and W, the same on every rank. The two actions of a pair run one after the other.
        device: where the tensors between stages lie.

    Raises ValueError for a schedule that is not valid, has updates (U) or segments, or does not fit axis or stages.
    """

    def __init__(
        self,
        stages: Stage | Mapping[int, Stage] | Mapping[Place, Stage],
        axis: Axis,
        schedule: Schedule,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        validate(schedule)
        if schedule.num_ranks != axis.size:
            raise ValueError(
                f"the schedule has {schedule.num_ranks} ranks but axis {axis.name!r} has {axis.size}; build the "
                f"schedule for {axis.size} ranks"
            )
        check_runs_here(schedule, torch.__version__)
        self._axis = axis
        self._schedule = schedule
        self._stages = _by_place(stages, schedule, axis.rank)
        self._receives = receive_order(schedule, axis.rank)
        self._edges = Edges(axis, torch.device(device))
        self._in_flight: dict[tuple[Place, int], InFlight] = {}
        self.peak_in_flight = 0  # most microbatches held at once in the last step, all stages together
        # Of each action of the last run, when it began, after what it waited for had arrived, and ended: seconds of
        # time.perf_counter, which the ranks of one host share. On a GPU, when it was issued.
        self.times: list[tuple[float, float]] = []

    def step(
        self, microbatches: Sequence[Any], *, on_last_backward: Accumulation | None = None
    ) -> list[Tensor]:
        """Runs forward and backward of all microbatches; gradients are added to the parameters' .grad.

        Args:
            microbatches: what the stages get as their second argument, one an item, the same number on every
                rank.
            on_last_backward: gradient buckets (or anything with `accumulate()`): their `accumulate()` is
                entered for every backward of this rank but the last, which therefore overlaps with the
                gradient reduction.

        Returns the detached losses, in the order of the microbatches, of those whose last stage is on this
        rank: all or none, where the schedule has one path.
        """
        if len(microbatches) != self._schedule.num_microbatches:
            raise ValueError(
                f"step got {len(microbatches)} microbatches but the schedule has "
                f"{self._schedule.num_microbatches}; build the schedule for {len(microbatches)}"
            )
        actions = self._schedule.lists[self._axis.rank]
        last = max((i for i, a in enumerate(actions) if a.kind in (BACKWARD, WEIGHT_GRADIENT)), default=None)
        self._in_flight.clear()
        self.peak_in_flight = 0
        losses: dict[int, Tensor] = {}

        def act(position: int, action: Action, mailbox: Mailbox) -> None:
            if action.kind == FORWARD:
                self._forward(action, microbatches[action.microbatch], mailbox, losses)
                return
            accumulates = on_last_backward is not None and position != last
            with on_last_backward.accumulate() if on_last_backward and accumulates else nullcontext():
                self._backward(action, mailbox)

        self._run(self._schedule, self._receives, act)
        return [losses[microbatch] for microbatch in sorted(losses)]

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Any]) -> list[Tensor]:
        """Runs only the forwards, of any number of microbatches, along the first path; returns like `step`."""
        schedule = forwards_of(self._schedule, len(microbatches))
        losses: dict[int, Tensor] = {}

        def act(_: int, action: Action, mailbox: Mailbox) -> None:
            self._compute(action, microbatches[action.microbatch], mailbox, losses, trains=False)

        self._run(schedule, receive_order(schedule, self._axis.rank), act)
        return [losses[microbatch] for microbatch in sorted(losses)]

    def _run(
        self,
        schedule: Schedule,
        receives: Sequence[Sequence[Message]],
        act: Callable[[int, Action, Mailbox], None],
    ) -> None:
        """Runs this rank's list; after a failure only its messages."""
        mailbox = Mailbox(self._edges, schedule)
        error: Exception | None = None
        header = Header()
        self.times = []
        for position, action in enumerate(schedule.lists[self._axis.rank]):
            mailbox.post(receives[position])
            if error is None:
                begin, waited = time.perf_counter(), mailbox.waited_s
                try:
                    act(position, action, mailbox)
                    self.times.append((begin + mailbox.waited_s - waited, time.perf_counter()))
                    continue
                except StageFailedError as failed:
                    header = failed.header
                    error = (ValueError if header.is_mistake else RuntimeError)(header.failure)
                except Exception as failed:
                    error = failed
                    where = f"rank {self._axis.rank} of axis {self._axis.name!r} failed in {action}"
                    header = Header(failure=f"{where}: {failed}", is_mistake=isinstance(failed, ValueError))
            mailbox.refuse(action, header)
        mailbox.finish()
        if error is not None:
            self._in_flight.clear()
            raise error

    def _forward(self, action: Action, microbatch: Any, mailbox: Mailbox, losses: dict[int, Tensor]) -> None:
        self._in_flight[action.place, action.microbatch] = self._compute(
            action, microbatch, mailbox, losses, trains=True
        )
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))

    def _compute(
        self, action: Action, microbatch: Any, mailbox: Mailbox, losses: dict[int, Tensor], *, trains: bool
    ) -> InFlight:
        """Runs the stage, and sends its outputs to the next one or keeps the loss."""
        needed, made = self._schedule.needed_by(action), self._schedule.sent_by(action)
        item, received = InFlight(()), None
        if needed is not None:
            header, item.inputs = mailbox.take(needed)
            received = received_by(header, item.inputs, trains=trains)
        returned = self._stages[action.place](received, microbatch)
        if made is None:
            losses[action.microbatch] = _loss(returned, action.stage).detach()
            item.root = returned
            return item
        outputs, is_tuple = as_value(returned, action.stage)
        self._check_device(outputs, action.stage)
        mailbox.send(made, describe(outputs, is_tuple), outputs)
        if trains:
            item.hold(outputs)
        return item

    def _backward(self, action: Action, mailbox: Mailbox) -> None:
        kind, stage, microbatch, path = action
        held = action.place, microbatch
        item = self._in_flight[held] if kind == INPUT_GRADIENT else self._in_flight.pop(held)
        if kind == WEIGHT_GRADIENT:
            item.backward_weight()
            return
        needed, made = self._schedule.needed_by(action), self._schedule.sent_by(action)
        if needed is not None:
            item.give(mailbox.take(needed)[1])
            # The gradient came back, so the activation had arrived and its buffer may go.
            mailbox.release(Message(ACTIVATION, stage + 1, microbatch, path))
        send = _send_nothing if made is None else partial(_send_gradients, mailbox, made, item.inputs)
        if kind == BACKWARD:
            item.backward(send)
        else:
            item.backward_input(send)

    def _check_device(self, outputs: Value, stage: int) -> None:
        for x in outputs:
            if x is not None and x.device.type != self._edges.device.type:
                raise ValueError(
                    f"stage {stage} returned a tensor on {x.device}, but this pipeline's tensors lie on "
                    f"{self._edges.device}; move it there, or give PipelineRuntime device={x.device.type!r}"
                )


def _send_gradients(mailbox: Mailbox, message: Message, inputs: Value, gradients: Value) -> None:
    if any(x is not None and x.requires_grad for x in inputs) and not any(g is not None for g in gradients):
        raise ValueError(
            f"the loss of microbatch {message.microbatch} does not depend on the input of stage "
            f"{message.sender[1]}, so no gradient can be sent back; let the stage use its input"
        )
    mailbox.send(message, describe(gradients), gradients)


def _send_nothing(_: Value) -> None:
    """On the first stage."""


def _loss(returned: Any, stage: int) -> Tensor:
    if not isinstance(returned, Tensor) or returned.dim() != 0:
        shape = (
            f"shape {tuple(returned.shape)}"
            if isinstance(returned, Tensor)
            else f"a {type(returned).__name__}"
        )
        raise ValueError(
            f"the last stage ({stage}) returned {shape} instead of a loss; return a scalar tensor"
        )
    return returned


def _by_place(
    stages: Stage | Mapping[int, Stage] | Mapping[Place, Stage], schedule: Schedule, rank: int
) -> dict[Place, Stage]:
    places = schedule.stages_of(rank)
    several = schedule.num_paths > 1
    names = places if several else [stage for _, stage in places]
    if not isinstance(stages, Mapping):
        if len(places) != 1:
            raise ValueError(
                f"the schedule gives rank {rank} the stages {names} but stages is a single one; pass a dict "
                f"of stage to module"
            )
        return {places[0]: stages}
    if sorted(stages) != names:
        raise ValueError(
            f"stages has {sorted(stages)} but the schedule gives rank {rank} {names}; pass these stages"
        )
    return {place: stages[name] for place, name in zip(places, names, strict=True)}  # type: ignore[index]
