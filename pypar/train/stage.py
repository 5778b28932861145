"""The model of a run as this rank's stages: pypar's or the user's own, spread over the mesh, with its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pypar.axis import Axis
from pypar.comm.identical import first_difference
from pypar.context_parallel.config import ContextConfig
from pypar.context_parallel.roles import check_joins_nothing
from pypar.mesh import Mesh
from pypar.models.family import Sizes
from pypar.ops import cross_entropy
from pypar.parallel import ParallelPlan, materialize, parallelize
from pypar.parallel.roles import ROLES, axes_of
from pypar.parallel.rules import own_plan
from pypar.pipeline_parallel import Schedule
from pypar.pipeline_parallel.action import WEIGHT_GRADIENT, Place
from pypar.pipeline_parallel.place import place_stages
from pypar.tensor_parallel import vocab_parallel_cross_entropy
from pypar.tensor_parallel.config import AXES as CUT_AXES
from pypar.train.config import RunConfig
from pypar.train.data.batch import Microbatch

# (what the model returned, targets [B, T]) -> the sum of the loss over this rank's positions, a scalar
Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
Plan: TypeAlias = "Mapping[str, str] | ParallelPlan | None"


class TrainingStage(nn.Module):
    """A stage as the pipeline runs it: hidden state in and out; the last stage gives the scaled loss.

    loss None: the model gives it, when it is told the targets.
    """

    def __init__(self, model: nn.Module, loss: Loss | None, *, is_last: bool) -> None:
        super().__init__()
        self.model, self.loss, self.is_last = model, loss, is_last
        self.takes_sequences = takes(model, "sequences")

    def forward(self, hidden: Any, microbatch: Microbatch) -> Any:
        given: dict[str, Any] = {"sequences": microbatch.sequences} if self.takes_sequences else {}
        if self.is_last and self.loss is None:
            given["targets"] = microbatch.targets
        out = self.model(microbatch.tokens if hidden is None else hidden, **given)
        if not self.is_last:
            return out
        return (out if self.loss is None else self.loss(out, microbatch.targets)) * microbatch.loss_scale


def check_whole_backwards(schedule: Schedule, config: RunConfig) -> None:
    """ValueError for parameters that come and go around a block's backward where that is computed in two parts."""
    is_split = any(action.kind == WEIGHT_GRADIENT for actions in schedule.lists for action in actions)
    if is_split and config.memory.zero == 3:
        raise ValueError(
            f"pipeline.schedule {config.pipeline.schedule!r} computes weights' gradients apart from a block's "
            "backward, and memory.zero=3 has its parameters only then; use memory.zero=2, or a schedule of whole "
            "backwards"
        )


Stages: TypeAlias = Mapping[Place, TrainingStage]


def takes(model: nn.Module, keyword: str) -> bool:
    """Whether a model's forward asks for something by this name, as for `pypar.sequences.Sequences` by "sequences"."""
    return keyword in inspect.signature(model.forward).parameters


def own_stages(
    make: Callable[..., Any],
    sizes: Sizes,
    mesh: Mesh,
    plan: ParallelPlan,
    schedule: Schedule,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Stages:
    """This rank's part of a model of pypar's, made by its class: nothing else is ever allocated."""
    with torch.device("meta"):
        model = make(sizes, seed=None, dtype=dtype)
    models = _spread(model, mesh, plan, schedule)
    for each in models.values():
        materialize(each, model.initial_weight(seed), device=device)
    loss = None if takes(model, "targets") else _vocabulary_loss(mesh.axis(*CUT_AXES))
    return _training(models, loss, schedule)


def stages_of(
    model: nn.Module,
    mesh: Mesh,
    plan: Plan,
    schedule: Schedule,
    loss: Loss | None,
    *,
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Stages:
    """The user's model, which every rank has with the same weights, spread as the plan says.

    ValueError, the same on every rank, for what this model cannot do on this mesh.
    """
    plan, context = ParallelPlan.of(plan), config.context
    given = (plan.roles or own_plan(model) or {}).values()
    if not any(ROLES[role].joins_sequences for role in given if role in ROLES):
        check_joins_nothing(mesh, type(model).__name__)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"this {type(model).__name__} is on the meta device, without values; give it values, the same on every rank"
        )
    if config.train.packed_documents and not takes(model, "sequences"):
        raise ValueError(
            f"train.packed_documents tells documents apart, and this {type(model).__name__}'s forward has no keyword "
            '"sequences" (pypar.sequences.Sequences) by which it would learn of them; give it one, or leave '
            "packed_documents out"
        )
    if plan.context not in (ContextConfig(), context):
        raise ValueError(
            f"the plan spreads attention with layout={plan.context.layout!r}, method={plan.context.method!r} and the "
            f"configuration cuts sequences with context.layout={context.layout!r}, "
            f"context.method={context.method!r}; say it in the configuration alone"
        )
    plan = replace(plan, context=context)
    model.to(device=device, dtype=dtype)
    difference = first_difference(list(model.named_parameters()), mesh.world)
    if difference is not None:
        raise ValueError(
            f"the ranks have different models: {difference} differs; build the model from one seed (torch.manual_seed) "
            "or load one checkpoint on every rank"
        )
    return _training(_spread(model, mesh, plan, schedule), loss or next_token_loss, schedule)


def next_token_loss(output: Any, targets: Tensor) -> Tensor:
    """The sum of the cross-entropy over the positions whose target is not -100; output: logits [B, T, V], or what has
    them as ``logits``."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != targets.shape:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"the model returned {what} where logits [B, T, V] belong to targets {tuple(targets.shape)}; give the "
            "Trainer a loss=, a function of what the model returns and the targets"
        )
    return cross_entropy(logits, targets).sum()


def _vocabulary_loss(axis: Axis) -> Loss:
    """The loss of logits [B, T, V/R], of which each rank of the axis has its part."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, targets, axis).sum()

    return loss


def _spread(
    model: nn.Module, mesh: Mesh, plan: ParallelPlan, schedule: Schedule
) -> Mapping[Place, nn.Module]:
    """The model of each stage that the schedule places on this rank."""
    if any(axis.size > 1 for axis in axes_of(mesh)):
        parallelize(model, mesh, plan)
    return place_stages(model, mesh, schedule)


def _training(models: Mapping[Place, nn.Module], loss: Loss | None, schedule: Schedule) -> Stages:
    last = schedule.num_stages - 1
    return {
        (path, stage): TrainingStage(model, loss, is_last=stage == last)
        for (path, stage), model in models.items()
    }
