"""Parameters that are frozen while a model is spread, of whose gradients a trial can measure nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pypar.parallel.regions import Inside
from pypar.sharded.partial import refuse_in_backward


def frozen_partial(kind: str, insides: Sequence[Inside]) -> list[nn.Parameter]:
    """Those beside cut layers of which the plan declares that a rank has a part of the gradient; the others are refused
    when they are trained later."""
    partial = []
    for inside in insides:
        if inside.parameter.requires_grad:
            continue
        if inside.certainty == "declared":
            partial.append(inside.parameter)
        else:
            refuse_in_backward(
                inside.parameter,
                f"{inside.name} was frozen when this {kind} was spread over ranks, so that nobody measured whether a "
                "rank has its whole gradient; call requires_grad_(True) before pypar.parallelize",
            )
    return partial
