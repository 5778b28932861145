"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

from typing import Any

import torch

from pypar.optimizers.config import OptimizerConfig
from pypar.optimizers.rule import UpdateRule


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW: one pass over master, gradient and both moments."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


RULE = UpdateRule(adamw, moments=("exp_avg", "exp_avg_sq"))
