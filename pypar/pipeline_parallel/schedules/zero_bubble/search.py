"""The automatic zero-bubble schedules: the shortest that is found within a memory (Qi et al., arXiv 2401.10241).

Many lists are written in simulated time, by a few rules each, and the one with the shortest span is kept. The rules
differ in how many forwards a rank is ahead, in whether it alternates forwards and input gradients or prefers the
latter, and in when it waits rather than beginning a weight gradient that does not fit in the gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

from pypar.pipeline_parallel.action import FORWARD, INPUT_GRADIENT, Action, Message, Schedule
from pypar.pipeline_parallel.schedules.registered import Option, Registered
from pypar.pipeline_parallel.schedules.zero_bubble.engine import Engine, FixedOrder, Plan
from pypar.pipeline_parallel.schedules.zero_bubble.h1 import h1
from pypar.pipeline_parallel.schedules.zero_bubble.h2 import h2
from pypar.pipeline_parallel.stage_cost import StageCost

PATIENCE = (0, 1, 2)
LATENESS = (1.0, 0.25)
ALLOWANCES = (1 / 3, 1 / 2, 2 / 3, 4 / 5)  # of the idle time of the best that was found before

WORTH_MORE = 0.005  # share of idle time from which on more is tried

MEMORY = "The limit of activations a rank, as a multiple of those of one_f_one_b's first."


class Ahead:
    """A plan of one stage a rank: rank r of p is at most 2(p-r)-1+`more` forwards ahead of its input gradients."""

    has_weights = False

    def __init__(self, num_ranks: int, num_microbatches: int, *, more: int, alternates: bool) -> None:
        self._ahead = [2 * (num_ranks - rank) - 1 + more for rank in range(num_ranks)]
        self._forwards, self._backwards = [0] * num_ranks, [0] * num_ranks
        self._num_microbatches = num_microbatches
        self._alternates = alternates
        self._last = [INPUT_GRADIENT] * num_ranks

    def offers(self, rank: int) -> Sequence[Action]:
        """The next input gradient and the next forward, as far as there are."""
        forwards, backwards = self._forwards[rank], self._backwards[rank]
        found = [Action(INPUT_GRADIENT, rank, backwards)] if backwards < forwards else []
        if forwards < min(self._num_microbatches, backwards + self._ahead[rank]):
            found.append(Action(FORWARD, rank, forwards))
        return found[::-1] if self._alternates and self._last[rank] == INPUT_GRADIENT else found

    def took(self, rank: int, action: Action) -> None:
        """Counts it."""
        (self._forwards if action.kind == FORWARD else self._backwards)[rank] += 1
        self._last[rank] = action.kind

    def left(self, rank: int) -> int:
        """How many input gradients are not run yet."""
        return self._num_microbatches - self._backwards[rank]


def searched(
    num_ranks: int,
    num_microbatches: int,
    *,
    costs: Sequence[StageCost],
    delay: Callable[[Message], float],
    memory: float,
) -> Schedule:
    """The schedule with the shortest span that was found for these costs, with one stage a rank.

    A rank r holds at most `memory` p times the activations of one microbatch of its stage, on p ranks.
    """
    limits = [memory * num_ranks * cost.activation for cost in costs]
    room = (
        int(memory * num_ranks) - 2 * num_ranks + 1
    )  # forwards ahead that the first rank can hold beside those
    plans: list[Callable[[], Plan]] = [
        partial(Ahead, num_ranks, num_microbatches, more=more, alternates=alternates)
        for more, alternates in itertools.product(sorted({0, 1, max(1, room)}), (False, True))
    ]
    written = (h1(num_ranks, num_microbatches, stages_per_rank=1), h2(num_ranks, num_microbatches))
    return shortest(written, plans, costs, delay, limits)


def shortest(
    written: Sequence[Schedule],
    plans: Sequence[Callable[[], Plan]],
    costs: Sequence[StageCost],
    delay: Callable[[Message], float],
    limits: Sequence[float],
) -> Schedule:
    """The shortest of some written schedules, and those that an `Engine` makes of their orders and of plans.

    The stages of all lie as in the first one written. ValueError where none keeps to the limits.
    """
    rules = written[0]
    best, lists = math.inf, None

    def attempt(plan: Callable[[], Plan], patience: int, late: float, allowance: float) -> None:
        nonlocal best, lists
        engine = Engine(rules, costs, delay, limits, patience, late, allowance)
        span = engine.run(plan())
        if span < best - 1e-12 * abs(span):
            best, lists = span, engine.lists

    for schedule in written:
        attempt(partial(FixedOrder, schedule, has_weights=True), 0, 0.0, 0.0)
    plans = [*(partial(FixedOrder, schedule, has_weights=False) for schedule in written), *plans]
    for plan, patience, late in itertools.product(plans, PATIENCE, LATENESS):
        attempt(plan, patience, late, 0.0)
    if lists is None:
        raise ValueError(
            f"no schedule of {rules.num_ranks} ranks was found that holds at most {max(limits):g} of activations a "
            "rank; allow more memory"
        )
    idle = best - max(sum(costs[a.stage].time(a.kind) for a in actions) for actions in lists)
    if idle > WORTH_MORE * best:
        for plan, share in itertools.product(plans, ALLOWANCES):
            attempt(plan, 0, 1.0, share * idle)
    return Schedule.of(lists, rules.placement)


def _registered(name: str, memory: float, description: str) -> Registered:
    option = Option("memory", memory, MEMORY, smallest=1)
    return Registered(name, searched, description, (option,), takes_costs=True)


ZB_1P = _registered("zb_1p", 1.0, "Searched for with the costs of the stages, in the memory of one_f_one_b.")
ZB_2P = _registered(
    "zb_2p", 2.0, "Searched for with the costs of the stages, in twice the memory of one_f_one_b."
)
