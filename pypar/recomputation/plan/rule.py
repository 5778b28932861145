"""A plan's choices for one block, as its region asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pypar.recomputation.operators import NAMES, overloads
from pypar.recomputation.plan.costs import INPUT, OFFLOAD, RECOMPUTE
from pypar.recomputation.plan.simulate import Call


@dataclass(frozen=True)
class Planned:
    """Choices by the place of an input, of an operator's call, of a saved tensor (`pypar.recomputation.kept.Rule`)."""

    inputs: Sequence[str]
    calls: Mapping[int, str]
    numbers: Mapping[int, str]
    of_torch: Mapping[Any, str]
    checks: bool = False

    @classmethod
    def of(cls, call: Call, choices: Sequence[str]) -> Planned:
        """The choices for the pieces of a call."""
        chosen = list(zip(call.block.pieces, call.memory, choices, strict=True))
        runs_again = any(choice == RECOMPUTE and piece.saved_bytes for piece, _, choice in chosen)
        inputs, calls, numbers = [], {}, {}
        for piece, memory, choice in chosen:
            if piece.name == INPUT:
                inputs.append(choice)
            elif piece.call is not None and runs_again:
                calls[piece.call] = choice
            else:
                numbers.update({number: choice for each in memory for number in each.numbers})
        # Listening to torch's operators takes 10 us each, which is left out where no result is given again.
        return cls(inputs, calls, numbers, overloads(NAMES) if runs_again else {})

    def keeps(self, call: int, name: str) -> bool:
        return self.calls.get(call, RECOMPUTE) != RECOMPUTE

    def saves(self, number: int) -> bool:
        return self.numbers.get(number, RECOMPUTE) != RECOMPUTE

    def moves_input(self, number: int) -> bool:
        return number < len(self.inputs) and self.inputs[number] == OFFLOAD

    def moves_result(self, call: int) -> bool:
        return self.calls.get(call) == OFFLOAD

    def moves_saved(self, number: int) -> bool:
        return self.numbers.get(number) == OFFLOAD
