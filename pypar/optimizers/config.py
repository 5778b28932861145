"""What a run's configuration says about its optimizer: the section ``optimizer``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with linear warm-up and a cosine down to ``min_lr_ratio * lr``."""

    name: str = "adamw"
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0: no clipping
