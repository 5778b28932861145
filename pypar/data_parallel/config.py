"""What a run's configuration says about who holds parameters, gradients and masters: the section ``store``."""

from collections.abc import Iterable
from dataclasses import dataclass

from pypar.settings import Section, setting


def _names() -> Iterable[str]:
    from pypar.data_parallel.stores import STORES

    return STORES


@dataclass(frozen=True)
class StoreConfig(Section):
    """Who holds parameters, gradients and what the optimizer updates."""

    name: str = setting("replicated", choices=_names, help="every rank of dp x cp holds all", resumed=None)
