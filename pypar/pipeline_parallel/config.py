"""What a run's configuration says about its pipeline: the section ``pipeline``."""

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.grid import STAGES
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Schedule
from pypar.settings import Run, Section, setting


@dataclass(frozen=True)
class PipelineConfig(Section):
    """The order in which stages work."""

    schedule: str = setting(
        "one_f_one_b", choices=schedules.names, help="`pypar schedule` shows each of them"
    )

    def check(self, run: Run) -> Sequence[str]:
        """Each stage holds a layer, and the schedule exists for so many stages and microbatches."""
        pp, num_microbatches = run.axes[STAGES], run.num_microbatches
        if run.num_layers is not None and run.num_layers < pp:
            raise ValueError(
                f"model.num_layers ({run.num_layers}) must be at least the pp size ({pp}): each stage holds a "
                f"layer; use pp={run.num_layers} or more layers"
            )
        schedule = schedules.build(self.schedule, pp, num_microbatches)
        check_one_path(self.schedule, schedule)
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


def check_one_path(name: str, schedule: Schedule) -> None:
    """ValueError for a schedule of which a run would have to keep copies of stages equal."""
    if schedule.num_paths > 1:
        raise ValueError(
            f"pipeline schedule {name} has {schedule.num_paths} copies of each stage, and a run trains one of each; "
            "use a schedule of one path"
        )
