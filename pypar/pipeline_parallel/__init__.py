"""Pipeline parallelism: the layers of a model cut into stages, one rank or several stages a rank.

A schedule is a list of actions per rank (`action`, `schedules`); one validator (`validate`), one simulator
(`simulate`), one picture (`picture`) and one runtime (`runtime`) serve every schedule.
"""

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Action
from pypar.pipeline_parallel.runtime import PipelineRuntime

__all__ = ["Action", "PipelineRuntime", "schedules"]
