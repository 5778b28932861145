"""What a run's configuration says about its pipeline: the section ``pipeline``."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pypar.grid import STAGES
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.compare import RankCost, choose
from pypar.pipeline_parallel.schedules.registered import options_of
from pypar.pipeline_parallel.trained import check_trains
from pypar.settings import Run, Section, setting

AUTO = "auto"


def _names() -> list[str]:
    return [*schedules.names(), AUTO]


def _check_options(key: str, value: str) -> None:
    options_of(value)


def _check_costs(key: str, value: str) -> None:
    RankCost.parse(value)


@dataclass(frozen=True)
class PipelineConfig(Section):
    """The order in which stages work."""

    schedule: str = setting(
        "one_f_one_b",
        choices=_names,
        help='`pypar schedule` shows each of them; "auto": the fastest for `costs` that fits into `memory`',
    )
    options: str = setting(
        "", refuse=_check_options, help='options of the schedule, such as "stages_per_rank=4"'
    )
    costs: str = setting(
        "",
        refuse=_check_costs,
        help='measured times of a microbatch on the layers of a rank, such as "F=18.5,I=18.1,W=9.3,comm=0.6"',
    )
    memory: float = setting(
        0.0,
        at_least=0,
        help='with "auto", how many microbatches\' activations of its layers a rank may hold; 0: any number',
    )

    def build(self, num_ranks: int, num_microbatches: int) -> Schedule:
        """The schedule of a run; ValueError, the same on every rank, for one that a run cannot have."""
        if self.schedule == AUTO:
            raise ValueError(
                f"pipeline.schedule {AUTO!r} is chosen before a run starts, where the number of layers is known; start "
                "it by `pypar train` or a Trainer without a mesh, or name a schedule"
            )
        registered, cost = schedules.find(self.schedule), self._cost
        of_stage = cost.layers.shared(registered.stages_per_rank)
        schedule = registered.build(
            num_ranks, num_microbatches, options_of(self.options), of_stage, cost.communication
        )
        check_trains(self.schedule, schedule)
        return schedule

    def chosen(self, run: Run) -> tuple["PipelineConfig", Sequence[str]]:
        """The section with a schedule in the place of "auto", and a note that says why.

        ValueError without costs, or where no schedule fits.
        """
        if self.schedule != AUTO:
            return self, ()
        if not self.costs:
            raise ValueError(
                f"pipeline.schedule {AUTO!r} needs pipeline.costs, the measured times of a microbatch on the layers of "
                'a rank: pipeline.costs="F=18.5,I=18.1,W=9.3,comm=0.6"'
            )
        if self.options:
            raise ValueError(
                f"pipeline.options ({self.options}) are of one schedule, and pipeline.schedule is {AUTO!r}; name the "
                "schedule, or leave them out"
            )
        best, why = choose(
            run.axes[STAGES],
            run.num_microbatches,
            self._cost,
            most_stages=run.num_layers or run.axes[STAGES],
            memory=self.memory or math.inf,
        )
        return dataclasses.replace(self, schedule=best.name), [f"pipeline.schedule: {why}"]

    @property
    def _cost(self) -> RankCost:
        """Of a run, which keeps all that autograd saved until W, and runs the two of a pair one after the other."""
        cost = RankCost.parse(self.costs, kept=1.0)
        return dataclasses.replace(cost, layers=dataclasses.replace(cost.layers, pair=None))

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
