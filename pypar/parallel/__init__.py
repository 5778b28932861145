"""Where a plain model meets a mesh: plans, the roles that they give to modules, `parallelize`."""

from pypar.parallel.apply import parallelize
from pypar.parallel.materialize import fill, materialize
from pypar.parallel.plan import ParallelPlan
from pypar.parallel.rules import plan_of
from pypar.tensor_parallel.roles import USUAL_PLAN

__all__ = ["USUAL_PLAN", "ParallelPlan", "fill", "materialize", "parallelize", "plan_of"]
