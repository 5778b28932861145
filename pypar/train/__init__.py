"""Training: a run from its configuration, by `pypar train` or from Python.

from pypar.train import Trainer, RunConfig
Trainer(RunConfig.from_dict({"train": {"steps": 100}})).fit()
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.train.config import RunConfig, load_config
    from pypar.train.trainer import Trainer

__all__ = ["RunConfig", "Trainer", "load_config"]

# A configuration is checked without torch.
__getattr__ = loader(
    __name__,
    {
        "RunConfig": "pypar.train.config",
        "Trainer": "pypar.train.trainer",
        "load_config": "pypar.train.config",
    },
    __all__,
)
