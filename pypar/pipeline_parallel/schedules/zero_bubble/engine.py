"""Writes lists by running ranks in simulated time: forwards and input gradients as a plan offers them, weight
gradients in the gaps.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from pypar.pipeline_parallel.action import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Message, Schedule
from pypar.pipeline_parallel.stage_cost import StageCost

ROUNDING = 1e-9  # of times and memory, relative to one forward


class Plan(Protocol):
    """What may come next on each rank. `has_weights`: with weight gradients, so that none are added."""

    has_weights: bool

    def offers(self, rank: int) -> Sequence[Action]:
        """The actions of which one may come, the one to be preferred first; none where the rank has done all."""
        ...

    def took(self, rank: int, action: Action) -> None:
        """The rank runs this offer."""
        ...

    def left(self, rank: int) -> int:
        """How many input gradients the rank has not run yet."""
        ...


class Engine:
    """Runs a plan.

    Args:
        rules: a schedule whose placement holds; its lists do not matter.
        costs: one a stage.
        delay: the time that a message between two ranks takes.
        limits: of the memory of each rank, in the unit of `StageCost.activation`.
        patience: for so many input gradients before its end a rank does not begin a weight gradient that would make
            the next offer wait.
        late: by what share of its time a weight gradient may make the next offer wait before that.
        allowance: so long a rank may be idle in all rather than begin a weight gradient that makes the next offer wait.
    """

    def __init__(
        self,
        rules: Schedule,
        costs: Sequence[StageCost],
        delay: Callable[[Message], float],
        limits: Sequence[float],
        patience: int,
        late: float,
        allowance: float,
    ) -> None:
        self._rules, self._costs, self._delay = rules, costs, delay
        self._limits, self._patience, self._lateness = limits, patience, late
        self._allowance = allowance
        num_ranks = len(limits)
        self.lists: list[list[Action]] = [[] for _ in range(num_ranks)]
        self._held = [0.0] * num_ranks
        self._late: list[deque[Action]] = [deque() for _ in range(num_ranks)]
        self._free = [0.0] * num_ranks
        self._idle = [0.0] * num_ranks  # since the rank began
        self._begun = [math.inf] * num_ranks
        self._arrival: dict[Message | None, float] = {None: 0.0}
        self._wake = [(0.0, rank) for rank in range(num_ranks)]
        self._rounding = ROUNDING * max(max(cost.forward, cost.activation) for cost in costs)

    def run(self, plan: Plan) -> float:
        """The longest span of a rank; infinite where the plan does not come to its end within the memory."""
        while self._wake:
            now, rank = heapq.heappop(self._wake)
            if now >= self._free[rank] - self._rounding:
                self._turn(plan, rank, max(now, self._free[rank]))
        if any(plan.offers(rank) or self._late[rank] for rank in range(len(self.lists))):
            return math.inf
        return max(end - begin for begin, end in zip(self._begun, self._free, strict=True))

    def _turn(self, plan: Plan, rank: int, now: float) -> None:
        """Lets a rank that is free begin something, or sleep until what it knows to come."""
        soon, is_full = math.inf, False
        for action in plan.offers(rank):
            arrival = self._arrival.get(self._rules.needed_by(action), math.inf)
            if arrival > now + self._rounding:
                soon = min(soon, arrival)
            elif action.kind == FORWARD and not self._fits(rank, action):
                is_full = True
            else:
                plan.took(rank, action)
                self._begin(rank, action, now)
                return
        can_fill = bool(self._late[rank]) and not plan.has_weights
        if can_fill and (is_full or not self._waits(plan, rank, now, soon)):
            self._begin(rank, self._late[rank][0]._replace(kind=WEIGHT_GRADIENT), now)
        elif soon < math.inf:
            heapq.heappush(self._wake, (soon, rank))

    def _fits(self, rank: int, action: Action) -> bool:
        held = self._held[rank] + self._costs[action.stage].activation
        return held <= self._limits[rank] + self._rounding

    def _waits(self, plan: Plan, rank: int, now: float, soon: float) -> bool:
        takes = self._costs[self._late[rank][0].stage].time(WEIGHT_GRADIENT)
        if now + takes > soon + self._rounding and self._idle[rank] + soon - now <= self._allowance:
            return True
        lateness = self._lateness if plan.left(rank) > self._patience else 0.0
        return now + takes > soon + lateness * takes + self._rounding

    def _begin(self, rank: int, action: Action, now: float) -> None:
        cost = self._costs[action.stage]
        ends = now + cost.time(action.kind)
        self.lists[rank].append(action)
        self._held[rank] += cost.memory_change(action.kind)
        if self._begun[rank] == math.inf:
            self._begun[rank] = now
        else:
            self._idle[rank] += now - self._free[rank]
        self._free[rank] = ends
        if action.kind == INPUT_GRADIENT:
            self._late[rank].append(action)
        elif action.kind == WEIGHT_GRADIENT:
            self._late[rank].remove(action._replace(kind=INPUT_GRADIENT))
        heapq.heappush(self._wake, (ends, rank))
        made = self._rules.sent_by(action)
        if made is None:
            return
        receiver = self._rules.placement[made.receiver]
        self._arrival[made] = ends
        if receiver != rank:
            self._arrival[made] += self._delay(made)
            heapq.heappush(self._wake, (max(now, self._free[receiver]), receiver))


class FixedOrder:
    """The actions of a schedule, each rank's in its order, with the weight gradients or without."""

    def __init__(self, schedule: Schedule, *, has_weights: bool) -> None:
        self.has_weights = has_weights
        self._order = [
            [a for a in actions if has_weights or a.kind != WEIGHT_GRADIENT] for actions in schedule.lists
        ]
        self._next = [0] * schedule.num_ranks
        self._left = [sum(a.kind == INPUT_GRADIENT for a in actions) for actions in self._order]

    def offers(self, rank: int) -> Sequence[Action]:
        """The next one."""
        return self._order[rank][self._next[rank] : self._next[rank] + 1]

    def took(self, rank: int, action: Action) -> None:
        """Goes on to the one behind it."""
        self._next[rank] += 1
        self._left[rank] -= action.kind == INPUT_GRADIENT

    def left(self, rank: int) -> int:
        """How many input gradients are not run yet."""
        return self._left[rank]
