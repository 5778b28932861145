"""What a run's configuration says about activations that are computed again: the section ``recompute``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.settings import Run, Section, setting

POLICIES = ("none", "full", "selective")


def names_in(ops: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in ops.split(",") if name.strip())


def _refuse_unknown(key: str, value: str) -> None:
    from pypar.recomputation.operators import check_names  # slow: torch

    if value:
        check_names(names_in(value))


@dataclass(frozen=True)
class RecomputeConfig(Section):
    """Which activations of the layers backward computes again instead of keeping them; policies change no bit."""

    policy: str = setting(
        "none",
        choices=POLICIES,
        help='"full": of a layer its inputs are kept; "selective": the results of its costly operators too',
        resumed=None,
    )
    every: int = setting(1, at_least=1, help="layers, of which the first is computed again", resumed=None)
    ops: str = setting(
        "",
        refuse=_refuse_unknown,
        help='operators whose results "selective" keeps, with commas between; "": attention, products of matrices, '
        "choices of routers",
        resumed=None,
    )
    checksums: bool = setting(
        False,
        help="compare what is computed again with checksums, to find a model whose forward differs; slow",
        resumed=None,
    )

    offload: bool = setting(
        False,
        help="what the layers keep waits for backward on the host, and comes back one layer ahead",
        resumed=None,
    )
    offload_min_bytes: int = setting(
        1 << 20, at_least=0, help="pieces of memory that are smaller stay on the device", resumed=None
    )

    tiles: int = setting(
        1,
        at_least=1,
        help="parts of a sequence in which feed-forward parts run one after the other; 1: at once",
        resumed="sums of gradients in another order",
    )

    def check(self, run: Run) -> Sequence[str]:
        """Operators are named for the policy that keeps their results only."""
        if self.ops and self.policy != "selective":
            raise ValueError(
                f'recompute.ops names what the policy "selective" keeps, and recompute.policy is "{self.policy}"; '
                "leave recompute.ops out"
            )
        return ()

    def check_budget(self, activation_bytes: str) -> None:
        """ValueError where a budget of activations chooses what this section has chosen already."""
        chosen = {"policy": self.policy != "none", "offload": self.offload, "every": self.every != 1}
        for key in (key for key, is_chosen in chosen.items() if activation_bytes and is_chosen):
            raise ValueError(
                f"memory.activation_bytes ({activation_bytes!r}) chooses for each tensor whether it is kept, computed "
                f"again or moved, and recompute.{key} chooses for all; leave one of them out"
            )
