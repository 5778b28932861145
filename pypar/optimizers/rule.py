"""What the registry knows about an optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pypar.optimizers.config import OptimizerConfig


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer turns gradients into updates.

    make(groups, config)   a torch optimizer over ``groups``, whose tensors are fp32 masters with their gradients in
                           ``grad``; a group has its own ``weight_decay``
    moments                its tensors beside each master, of the master's shape, zero before the first update; their
                           names are those of the torch optimizer's state, and of checkpoints
    """

    make: Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]
