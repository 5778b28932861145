"""What a run's configuration says about its pipeline: the section ``pipeline``."""

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.grid import STAGES
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import UPDATE, Schedule
from pypar.pipeline_parallel.schedules.registered import options_of
from pypar.settings import Run, Section, setting


def _check_options(key: str, value: str) -> None:
    options_of(value)


@dataclass(frozen=True)
class PipelineConfig(Section):
    """The order in which stages work."""

    schedule: str = setting(
        "one_f_one_b", choices=schedules.names, help="`pypar schedule` shows each of them"
    )
    options: str = setting(
        "", refuse=_check_options, help='options of the schedule, such as "stages_per_rank=4"'
    )

    def build(self, num_ranks: int, num_microbatches: int) -> Schedule:
        """The schedule of a run; ValueError, the same on every rank, for one that a run cannot have."""
        schedule = schedules.find(self.schedule).build(num_ranks, num_microbatches, options_of(self.options))
        check_trains(self.schedule, schedule)
        return schedule

    def check(self, run: Run) -> Sequence[str]:
        """Each stage holds a layer, and the schedule exists for so many stages and microbatches."""
        pp, num_microbatches = run.axes[STAGES], run.num_microbatches
        if run.num_layers is not None and run.num_layers < pp:
            raise ValueError(
                f"model.num_layers ({run.num_layers}) must be at least the pp size ({pp}): each stage holds a "
                f"layer; use pp={run.num_layers} or more layers"
            )
        schedule = self.build(pp, num_microbatches)
        if run.num_layers is not None and run.num_layers < schedule.num_stages:
            raise ValueError(
                f"model.num_layers ({run.num_layers}) must be at least {schedule.num_stages}, the stages of the "
                f"pipeline schedule {self.schedule} on {pp} ranks: each holds a layer; use more layers or a smaller pp"
            )
        if num_microbatches < pp:
            idle = (pp - 1) / (num_microbatches + pp - 1)
            count = f"{num_microbatches} microbatch{'es' * (num_microbatches > 1)}"
            return [f"{pp} stages with {count} a step leave each rank idle {idle:.0%} of the time"]
        return ()


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
