"""Pipeline parallelism: the layers of a model cut into stages, one rank or several stages a rank.

A schedule is a list of actions per rank and a placement of the stages (`action`; `schedules` builds them by
name). One validator (`validate`), one simulator (`simulate`), one picture (`picture`) and one runtime
(`runtime`) serve every schedule, also one that is written by hand: `Schedule.of(lists)`.
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Action, Schedule
from pypar.pipeline_parallel.simulate import simulate
from pypar.pipeline_parallel.stage_cost import StageCost
from pypar.pipeline_parallel.validate import validate

if TYPE_CHECKING:
    from pypar.pipeline_parallel.runtime import PipelineRuntime

__all__ = ["Action", "PipelineRuntime", "Schedule", "StageCost", "schedules", "simulate", "validate"]

# Schedules are looked at, and configurations checked, without torch; the runtime needs it.
__getattr__ = loader(__name__, {"PipelineRuntime": "pypar.pipeline_parallel.runtime"}, __all__)
