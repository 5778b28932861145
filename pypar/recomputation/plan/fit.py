"""The plan for a step that was watched, which may have several microbatches in flight or a backward in two parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pypar.recomputation.plan.choose import Chosen, choose, least_bytes
from pypar.recomputation.plan.costs import BlockCosts, Copying
from pypar.recomputation.plan.simulate import Call, Event, simulate

_BUDGETS = 24


def fit(
    blocks: Sequence[BlockCosts],
    calls: Sequence[Call],
    places: Sequence[int],
    events: Sequence[Event],
    budget_bytes: int,
    copying: Copying,
    num_in_flight: int,
) -> tuple[Chosen, Mapping[str, int]]:
    """The choice of the least seconds whose peak in the step is within the budget, and that peak by `simulate`.

    places: the block of each call. With one microbatch in flight `choose` bounds the peak, and its choice is the best.
    Otherwise the choices for budgets of one microbatch are tried too, the same ones whatever the budget is. ValueError:
    none is within it; it says the least that one of them needs.
    """

    def played(chosen: Chosen) -> Mapping[str, int]:
        return simulate(calls, events, [chosen.options[place].choices for place in places])

    first = choose(blocks, budget_bytes, copying)
    tried = [] if first is None else [(first, played(first))]
    if num_in_flight > 1 or not tried or tried[0][1]["device"] > budget_bytes:
        least, saved = least_bytes(blocks, copying), sum(block.saved_bytes for block in blocks)
        budgets = sorted({least + max(0, saved - least) * i // (_BUDGETS - 1) for i in range(_BUDGETS)})
        found = dict.fromkeys(choose(blocks, budget, copying) for budget in budgets)
        tried += [(each, played(each)) for each in found if each is not None]
    within = [each for each in tried if each[1]["device"] <= budget_bytes]
    if not within:
        needed = min(most["device"] for _, most in tried)
        raise ValueError(
            f"activations of these {len(blocks)} blocks need at least {needed:,} bytes, {num_in_flight} of each in "
            f"flight, and the budget is {budget_bytes:,}; raise it, or make microbatches smaller"
        )
    return min(within, key=lambda each: (each[0].added_s, each[1]["device"], each[0].peak_bytes))
