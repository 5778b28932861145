"""The dynamic loss scale of fp16: gradients are multiplied by it, so that small ones are not lost.

Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), with the hysteresis of Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pypar.optimizers.config import LossScaleConfig

GROWTH = 2.0  # powers of two round nothing


class LossScale:
    """A number that halves when gradients overflow and doubles when they have not for long.

    value         what the loss is multiplied by now
    good_steps    updates since the last overflow or growth; at ``growth_interval`` the scale doubles
    spare         overflows that are still forgiven: at the last, and at each one after it, the scale halves. Growth
                  makes them as many as ``hysteresis`` again
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self.value, self.good_steps, self.spare = config.initial, 0, config.hysteresis

    def update(self, *, overflowed: bool) -> None:
        """After a step, the same on every rank. RuntimeError where the scale would fall below ``least``."""
        config = self._config
        if not overflowed:
            self.good_steps += 1
            if self.good_steps == config.growth_interval:
                self.value, self.good_steps, self.spare = self.value * GROWTH, 0, config.hysteresis
            return
        self.good_steps = 0
        self.spare = max(self.spare - 1, 0)
        if self.spare > 0:
            return
        if self.value / GROWTH < config.least:
            raise RuntimeError(
                f"gradients are not finite with a loss scale of {self.value:g}, and half of it is below "
                f"loss_scale.least ({config.least:g}); the weights were not changed. Lower optimizer.lr, use "
                'train.precision "bf16", or look at the data of this step'
            )
        self.value /= GROWTH

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"value": self.value, "good_steps": self.good_steps, "spare": self.spare}

    def load(self, state: Any) -> None:
        """Go on from a checkpoint; None, of a run without a loss scale: from the start.

        ValueError where it is no such state.
        """
        if state is None:
            self.__init__(self._config)  # type: ignore[misc]
            return
        kinds = {"value": float, "good_steps": int, "spare": int}
        if (
            not isinstance(state, Mapping)
            or any(type(state.get(name)) is not kind for name, kind in kinds.items())
            or not 0 < state["value"] < float("inf")
            or min(state["good_steps"], state["spare"]) < 0
        ):
            raise ValueError("the checkpoint's loss_scale is not one; start a run of another name")
        self.value = state["value"]
        self.good_steps = min(state["good_steps"], self._config.growth_interval - 1)
        self.spare = min(state["spare"], self._config.hysteresis)
