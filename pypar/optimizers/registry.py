"""Every optimizer by the name that ``optimizer.name`` gives it."""

from pypar.ops.backend import unknown_name
from pypar.optimizers import adamw
from pypar.optimizers.rule import UpdateRule

OPTIMIZERS: dict[str, UpdateRule] = {
    "adamw": adamw.RULE,
}


def rule_named(name: str) -> UpdateRule:
    """ValueError where there is none of that name."""
    if name not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer", name, sorted(OPTIMIZERS)))
    return OPTIMIZERS[name]
