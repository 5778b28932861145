"""Which schedules a training run can have."""

from __future__ import annotations

from pypar.pipeline_parallel.action import UPDATE, Schedule


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
