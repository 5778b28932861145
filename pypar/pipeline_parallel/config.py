"""What a run's configuration says about its pipeline: the section ``pipeline``."""

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.pipeline_parallel import schedules
from pypar.settings import Run, Section, setting


@dataclass(frozen=True)
class PipelineConfig(Section):
    """The order in which stages work."""

    schedule: str = setting(
        "one_f_one_b", choices=schedules.names, help="`pypar schedule` shows each of them"
    )

    def check(self, run: Run) -> Sequence[str]:
        """Each stage holds a layer, and the schedule exists for so many stages and microbatches."""
        pp, num_microbatches = run.axes["pp"], run.num_microbatches
        if run.num_layers < pp:
            raise ValueError(
                f"model.num_layers ({run.num_layers}) must be at least the pp size ({pp}): each stage holds a "
                f"layer; use pp={run.num_layers} or more layers"
            )
        schedules.build(self.schedule, pp, num_microbatches)
        if num_microbatches < pp:
            idle = (pp - 1) / (num_microbatches + pp - 1)
            count = f"{num_microbatches} microbatch{'es' * (num_microbatches > 1)}"
            return [f"{pp} stages with {count} a step leave each rank idle {idle:.0%} of the time"]
        return ()
