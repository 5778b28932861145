"""What is spread and how: names of modules to roles, and the options of the roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pypar.context_parallel.config import ContextConfig


@dataclass(frozen=True)
class ParallelPlan:
    """How a plain model is spread over a mesh.

    roles              patterns of module names (fnmatch; the first that fits counts) to roles; None: the model's own
                       plan, see `pypar.parallelize`
    sequence_parallel  between the layers that are cut over tp, each rank has 1/tp of the positions (arXiv 2205.05198).
                       Every parameter that is not cut needs the role "norm": ranks have a part of its gradient
    context            layout and method of the roles "attention" and "positions"
    """

    roles: Mapping[str, str] | None = None
    sequence_parallel: bool = False
    context: ContextConfig = field(default_factory=ContextConfig)

    @classmethod
    def of(cls, given: Mapping[str, Any] | ParallelPlan | None) -> ParallelPlan:
        """A plan as it is, or one of these roles."""
        return given if isinstance(given, ParallelPlan) else cls(given)
