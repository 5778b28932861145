"""Which schedules a training run can have, and which the runtime can run; without torch, to be asked before a run."""

from __future__ import annotations

from pypar.pipeline_parallel.action import INPUT_GRADIENT, UPDATE, WEIGHT_GRADIENT, Schedule


def check_trains(name: str, schedule: Schedule) -> None:
    """ValueError for a schedule that the simulator and the picture know, and a run cannot have."""
    if schedule.num_paths > 1:
        raise ValueError(
            f"pipeline schedule {name} has {schedule.num_paths} copies of each stage, and a run trains one of each; "
            "use a schedule of one path"
        )
    if schedule.num_segments > 1:
        raise ValueError(
            f"pipeline schedule {name} cuts every sequence into {schedule.num_segments} segments, and a run does not "
            "keep keys and values from one segment to the next; use a schedule of whole sequences"
        )
    if any(action.kind == UPDATE for actions in schedule.lists for action in actions):
        raise ValueError(
            f"pipeline schedule {name} updates weights while microbatches are in flight, and a run keeps one version "
            "of the weights and updates them after the step; use a schedule without U"
        )


def check_runs_here(schedule: Schedule, torch_version: str) -> None:
    """ValueError for a valid schedule that `PipelineRuntime` cannot run with this torch."""
    if schedule.num_segments > 1:
        raise ValueError(
            f"the schedule cuts every sequence into {schedule.num_segments} segments, and the runtime does not keep "
            "keys and values from one segment to the next; use a schedule of whole sequences"
        )
    old = tuple(int(part) for part in torch_version.split(".")[:2]) < (2, 7)
    for rank, actions in enumerate(schedule.lists):
        for position, action in enumerate(actions):
            where = f"rank {rank}, position {position}: {action}"
            if action.kind == UPDATE:
                raise ValueError(
                    f"{where} is an update of weights, which the runtime leaves to the optimizer after the "
                    f"step; use a schedule without U"
                )
            if old and action.kind in (INPUT_GRADIENT, WEIGHT_GRADIENT):
                raise ValueError(
                    f"{where} is a split backward, which needs torch 2.7 or newer and this is "
                    f"{torch_version}; use a schedule of F and B"
                )
