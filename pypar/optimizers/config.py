"""What a run's configuration says about its optimizer: the sections ``optimizer`` and ``loss_scale``."""

from collections.abc import Iterable
from dataclasses import dataclass

from pypar.settings import Section, setting


def _names() -> Iterable[str]:
    from pypar.optimizers.registry import OPTIMIZERS

    return OPTIMIZERS


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer, with linear warm-up and a cosine down to ``min_lr_ratio * lr``."""

    resumed = "from this step on; the moments are kept"

    name: str = setting("adamw", choices=_names, help="the rule of the update")
    lr: float = setting(3e-3, above=0, help="learning rate after the warm-up")
    min_lr_ratio: float = setting(0.1, at_least=0, at_most=1, help="of lr, at the last step")
    warmup_steps: int = setting(20, at_least=0, help="steps in which the learning rate rises to lr")
    beta1: float = setting(0.9, at_least=0, below=1, help="share of the first moment that stays")
    beta2: float = setting(0.95, at_least=0, below=1, help="share of the second moment that stays")
    eps: float = setting(1e-8, above=0, help="what is added to the root of the second moment")
    weight_decay: float = setting(0.1, at_least=0, help="of matrices; vectors do not decay")
    clip_norm: float = setting(1.0, at_least=0, help="largest norm of all gradients together; 0: no clipping")


@dataclass(frozen=True)
class LossScaleConfig(Section):
    """The dynamic loss scale of `train.precision = "fp16"`; other precisions have none."""

    resumed = "from this step on; the scale is the checkpoint's"

    initial: float = setting(65536.0, above=0, help="what the loss is multiplied by at first")
    growth_interval: int = setting(
        2000, at_least=1, help="updates without an overflow after which the scale doubles"
    )
    hysteresis: int = setting(
        2, at_least=1, help="the scale halves at the last of so many overflows, and at each one after it"
    )
    least: float = setting(1.0, above=0, help="the run ends with an error where the scale would fall below")
