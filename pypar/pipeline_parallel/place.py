"""The stages of a model that a rank has, by a schedule's placement."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from pypar.blocks import check_stages, keep_stage, shares_across_stages
from pypar.grid import STAGES
from pypar.mesh import Mesh
from pypar.pipeline_parallel.action import Place, Schedule
from pypar.pipeline_parallel.config import PipelineConfig


def schedule_of(config: PipelineConfig, mesh: Mesh, num_microbatches: int) -> Schedule:
    """The schedule that a configuration names, on a mesh."""
    return config.build(mesh.axis(STAGES).size, num_microbatches)


def place_stages(model: nn.Module, mesh: Mesh, schedule: Schedule) -> Mapping[Place, nn.Module]:
    """This rank's stages of a whole model, which has no others afterwards: {(path, stage): model without the rest}.

    Several stages on a rank are models of their own, over the same parameters. ValueError, the same on every rank, for
    a model that cannot be cut into so many stages (`pypar.blocks.check_stages`), and for one whose first and last stage
    share parameters and are not on the first and the last rank, which sum the gradients of what they share.
    """
    axis, places = mesh.axis(STAGES), list(schedule.placement)
    if schedule.num_stages == 1:
        return {places[0]: model}
    check_stages(model, schedule.num_stages)
    last = schedule.num_stages - 1
    ends = schedule.placement[0, 0], schedule.placement[0, last]
    if (ends != (0, axis.size - 1) or axis.size == 1) and shares_across_stages(model, schedule.num_stages):
        raise ValueError(
            f"this schedule has the first and the last stage on ranks {ends[0]} and {ends[1]} of {axis.name}, and they "
            f"share parameters, whose gradients are summed over the first and the last rank; use a schedule that puts "
            "them there, or embeddings that are not tied"
        )
    own = schedule.stages_of(axis.rank)
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copies = [copy.deepcopy(model, dict(shared)) for _ in own[1:]]
    for (_, stage), each in zip(own, [model, *copies], strict=True):
        keep_stage(each, schedule.num_stages, stage)
    return dict(zip(own, [model, *copies], strict=True))
