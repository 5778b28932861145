"""Runs a pipeline schedule: the same code for every schedule, and for any number of ranks including one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pypar.mesh import Axis
from pypar.pipeline_parallel.action import (
    ACTIVATION,
    BACKWARD,
    FORWARD,
    GRADIENT,
    Action,
    Message,
    Schedule,
    num_microbatches_of,
    stage_ranks,
)
from pypar.pipeline_parallel.mailbox import Mailbox, receive_plan
from pypar.pipeline_parallel.validate import validate

Stage = Callable[[Tensor | None, Any], Tensor]


class Accumulation(Protocol):
    """What `step` needs of gradient buckets: a context in which backward starts no reduction."""

    def accumulate(self) -> AbstractContextManager[Any]: ...


@dataclass
class _InFlight:
    """One microbatch of one stage between its forward and its backward."""

    hidden: Tensor | None  # the stage's input, a leaf whose gradient is sent back; None on stage 0
    root: Tensor  # scalar whose backward is the stage's backward: the loss, or an `_OutputAnchor`
    output_gradient: list[Tensor] = field(default_factory=list)  # filled just before backward


class _OutputAnchor(torch.autograd.Function):
    """A scalar that stands for a stage's output in the graph, so that the output is free once sent.

    backward hands on the gradient that lies in `gradient` by then.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient.pop(), None


class PipelineRuntime:
    """Trains the stages of one rank by a schedule.

    Args:
        module: this rank's stage, or {stage: module} where the schedule gives it several. Called as
            module(hidden, microbatch): hidden is None on stage 0, else the previous stage's output; it
            returns the hidden tensor for the next stage, or on the last stage the loss, a scalar that is
            already scaled.
        axis: the pp axis; its size is the number of lists in `schedule`. Size 1 needs no process group.
        schedule: a list of `Action`s per rank, the same on every rank, of kinds F and B.
        activation_shape, activation_dtype: of every tensor between stages.
        device: where the tensors between stages lie.

    Raises ValueError for a schedule that is not valid, has kinds I or W, or does not fit axis or module.
    """

    def __init__(
        self,
        module: Stage | Mapping[int, Stage],
        axis: Axis,
        schedule: Schedule,
        *,
        activation_shape: Sequence[int],
        activation_dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        validate(schedule)
        if len(schedule) != axis.size:
            raise ValueError(
                f"the schedule has {len(schedule)} ranks but axis {axis.name!r} has {axis.size}; build the "
                f"schedule for"
                f" {axis.size} ranks"
            )
        _refuse_split_backward(schedule)
        self._axis = axis
        self._schedule = schedule
        self._ranks = stage_ranks(schedule)
        own_stages = [stage for stage, rank in self._ranks.items() if rank == axis.rank]
        self._modules = _by_stage(module, own_stages, axis.rank)
        self._num_microbatches = num_microbatches_of(schedule)
        self._plan = receive_plan(schedule, axis.rank)
        self._new_mailbox = partial(
            Mailbox, axis, self._ranks, activation_shape, activation_dtype, torch.device(device)
        )
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        self.peak_in_flight = 0  # most microbatches held at once in the last step, all stages together

    def step(
        self, microbatches: Sequence[Any], *, on_last_backward: Accumulation | None = None
    ) -> list[Tensor]:
        """Runs forward and backward of all microbatches; gradients are added to the parameters' .grad.

        Args:
            microbatches: what the modules get as their second argument, one an item, the same number on
                every rank.
            on_last_backward: gradient buckets (or anything with `accumulate()`): their `accumulate()` is
                entered for every backward of this rank but the last, which therefore overlaps with the
                gradient reduction.

        Returns the detached losses in the order of the microbatches where this rank has the last stage, else
        [].
        """
        if len(microbatches) != self._num_microbatches:
            raise ValueError(
                f"step got {len(microbatches)} microbatches but the schedule has {self._num_microbatches}; "
                f"build the schedule"
                f" for {len(microbatches)}"
            )
        actions = self._schedule[self._axis.rank]
        last_backward = max(i for i, action in enumerate(actions) if action.kind == BACKWARD)
        mailbox = self._new_mailbox()
        losses: dict[int, Tensor] = {}
        self._in_flight.clear()
        self.peak_in_flight = 0
        for position, action in enumerate(actions):
            mailbox.post(self._plan[position])
            if action.kind == FORWARD:
                self._forward(action, microbatches[action.microbatch], mailbox, losses)
                continue
            accumulates = on_last_backward is not None and position != last_backward
            with on_last_backward.accumulate() if on_last_backward and accumulates else nullcontext():
                self._backward(action, mailbox)
        mailbox.finish()
        return [losses[microbatch] for microbatch in sorted(losses)]

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Any]) -> list[Tensor]:
        """Runs only the forwards, of any number of microbatches; returns like `step`."""
        schedule = forwards_of(self._ranks, len(self._schedule), len(microbatches))
        plan = receive_plan(schedule, self._axis.rank)
        mailbox = self._new_mailbox()
        losses: dict[int, Tensor] = {}
        for position, action in enumerate(schedule[self._axis.rank]):
            mailbox.post(plan[position])
            hidden = self._take_hidden(action, mailbox)
            output = self._modules[action.stage](hidden, microbatches[action.microbatch])
            self._hand_on(action, output, mailbox, losses)
        mailbox.finish()
        return [losses[microbatch] for microbatch in sorted(losses)]

    def _forward(self, action: Action, microbatch: Any, mailbox: Mailbox, losses: dict[int, Tensor]) -> None:
        hidden = self._take_hidden(action, mailbox)
        if hidden is not None:
            hidden.requires_grad_(True)
        output = self._modules[action.stage](hidden, microbatch)
        self._hand_on(action, output, mailbox, losses)
        item = _InFlight(hidden, output)
        if not self._is_last(action.stage):
            item.root = _OutputAnchor.apply(output, item.output_gradient)  # type: ignore[no-untyped-call]
        self._in_flight[action.stage, action.microbatch] = item
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))

    def _backward(self, action: Action, mailbox: Mailbox) -> None:
        _, stage, microbatch = action
        item = self._in_flight.pop((stage, microbatch))
        if not self._is_last(stage):
            item.output_gradient.append(mailbox.take(Message(GRADIENT, stage, microbatch)))
            # The gradient came back, so the activation had arrived and its buffer may go.
            mailbox.release(Message(ACTIVATION, stage + 1, microbatch))
        if item.hidden is not None:
            message = Message(GRADIENT, stage - 1, microbatch)
            item.hidden.register_post_accumulate_grad_hook(partial(_send_gradient, mailbox, message))
        if item.root.requires_grad:  # not so for a first stage whose parameters are all frozen
            item.root.backward()  # type: ignore[no-untyped-call]
        if item.hidden is not None and item.hidden.grad is None:
            raise ValueError(
                f"the loss of microbatch {microbatch} does not depend on the input of stage {stage}, so no "
                f"gradient can be"
                " sent back; let the stage use its input"
            )

    def _take_hidden(self, action: Action, mailbox: Mailbox) -> Tensor | None:
        if action.stage == 0:
            return None
        return mailbox.take(Message(ACTIVATION, action.stage, action.microbatch))

    def _hand_on(self, action: Action, output: Tensor, mailbox: Mailbox, losses: dict[int, Tensor]) -> None:
        """Sends the output to the next stage, or keeps the loss."""
        if not self._is_last(action.stage):
            mailbox.send(Message(ACTIVATION, action.stage + 1, action.microbatch), output)
            return
        if output.dim() != 0:
            raise ValueError(
                f"the last stage ({action.stage}) returned shape {tuple(output.shape)} instead of a loss; "
                f"return a scalar"
                " tensor"
            )
        losses[action.microbatch] = output.detach()

    def _is_last(self, stage: int) -> bool:
        return stage == len(self._ranks) - 1


def forwards_of(ranks: Mapping[int, int], num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    """The forward-only schedule for stages that lie as `ranks` ({stage: rank}) says.

    Microbatches pass in groups of num_ranks, each group through all stages: with one stage a rank that is
    the plain order, with several the ranks take turns. Every action comes after what it needs in one order
    of all actions, so it cannot deadlock.
    """
    order = sorted(
        (microbatch // num_ranks, stage, microbatch)
        for stage in ranks
        for microbatch in range(num_microbatches)
    )
    actions = [Action(FORWARD, stage, microbatch) for _, stage, microbatch in order]
    return [[action for action in actions if ranks[action.stage] == rank] for rank in range(num_ranks)]


def _send_gradient(mailbox: Mailbox, message: Message, hidden: Tensor) -> None:
    """Runs in backward as soon as the input's gradient is complete, before parameters that come later."""
    assert hidden.grad is not None
    mailbox.send(message, hidden.grad)


def _refuse_split_backward(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            if action.kind not in (FORWARD, BACKWARD):
                raise ValueError(
                    f"rank {rank}, position {position}: {action} is a split backward, which the runtime "
                    f"does not run;"
                    " use a schedule of F and B"
                )


def _by_stage(module: Stage | Mapping[int, Stage], stages: list[int], rank: int) -> dict[int, Stage]:
    if not isinstance(module, Mapping):
        if len(stages) != 1:
            raise ValueError(
                f"the schedule gives rank {rank} the stages {stages} but module is a single one; pass a "
                f"dict of stage to module"
            )
        return {stages[0]: module}
    if sorted(module) != stages:
        raise ValueError(
            f"module has stages {sorted(module)} but the schedule gives rank {rank} {stages}; pass these "
            f"stages"
        )
    return dict(module)
