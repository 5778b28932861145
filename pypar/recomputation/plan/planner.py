"""`plan_activations`: a budget of bytes for what a model's blocks keep, met at the least time."""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pypar.axis import Axis
from pypar.recomputation.holdings import Holdings
from pypar.recomputation.kept import Kept, Part
from pypar.recomputation.offload import MIN_BYTES, Offload, Visit
from pypar.recomputation.parts import blocks_here, set_part
from pypar.recomputation.plan.agree import agreed
from pypar.recomputation.plan.costs import BlockCosts, Copying
from pypar.recomputation.plan.fit import fit
from pypar.recomputation.plan.rule import Planned
from pypar.recomputation.plan.simulate import Call
from pypar.recomputation.plan.table import lines
from pypar.recomputation.plan.trace import Trace, TracedRegion, call_of
from pypar.recomputation.region import Region
from pypar.settings import num_bytes

_MEASURED_BYTES = 64 << 20  # copied to tell the rate of copies, at most
_MOST_PLANS = 8  # of different shapes, the latest


@dataclass(frozen=True)
class ActivationPlan:
    """What is chosen for calls of one set of shapes.

    peak_bytes, host_bytes  the most at once of what blocks keep, make again and bring back; on the host no more than
    added_s                 seconds of a step for it, by what was measured
    table                   lines to print: each block, operator, bytes, choice and seconds
    """

    rules: dict[Hashable, Planned]
    num_in_flight: int
    peak_bytes: int
    host_bytes: int
    added_s: float
    table: tuple[str, ...]


class ActivationPlanner:
    """Meets a budget for the activations of models' blocks: see `plan_activations`.

    plan            the latest; None before the first step is over
    measured_bytes  the most that blocks have held at once since it was made
    """

    def __init__(
        self,
        budget_bytes: int | str,
        *,
        axis: Axis | None = None,
        offload: bool = True,
        min_bytes: int | str = MIN_BYTES,
        report: Callable[[str], object] | None = None,
    ) -> None:
        if axis is not None and not isinstance(axis, Axis):
            raise ValueError(f"axis ({axis!r}) must be an axis of a mesh, such as mesh.tp, or None")
        if report is not None and not callable(report):
            raise ValueError(f"report ({report!r}) must be a function of a line, such as print, or None")
        self.budget_bytes = num_bytes(budget_bytes)
        if self.budget_bytes < 1:
            raise ValueError(f"the budget of activations ({budget_bytes}) must be at least 1 byte")
        self.plan: ActivationPlan | None = None
        self._axis, self._report = axis, report
        self.offload = Offload(min_bytes=min_bytes if offload else sys.maxsize)
        self._moves = offload
        self._trace: Trace | None = None
        self._plans: list[ActivationPlan] = []
        self._open: list[tuple[Hashable, weakref.ref[Visit]]] = []  # what is in flight
        self._waits = False
        self._meter: Holdings | None = None
        self._has_warned = False

    def __reduce__(self) -> Any:
        """A copy of a model makes a plan of its own."""
        return _planner, (self.budget_bytes, self._moves, self.offload.min_bytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationPlanner:
        copied = _planner(self.budget_bytes, self._moves, self.offload.min_bytes)
        copied._axis, copied._report = self._axis, self._report
        memo[id(self)] = copied
        return copied

    @property
    def measured_bytes(self) -> int:
        """The most that blocks have held at once since the latest plan was made."""
        return self._meter.peak if self._meter is not None else 0

    def add(self, model: nn.Module, blocks: Iterable[str] | None = None) -> None:
        """Take the blocks of a model into the budget. ValueError: none are found."""
        found = blocks_here(model, blocks)
        for place, (_, name, module) in enumerate(found):
            is_last = place == len(found) - 1
            members = list(module.modules())
            set_part(module, Part(name, Kept(), members, self.offload, place, is_last, self))

    def run(
        self, part: Part, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a block, as the plan says, or watched to make one."""
        key = id(part), _signature(part, args, kwargs)
        part.offload = self.offload  # in a copy of a model the copy's
        rule = self._rule(key)
        visit = self.offload.visit(part.index)
        self._open.append((key, weakref.ref(visit)))
        if rule is None and self._trace is not None:
            return TracedRegion(part, function, self._trace, key, visit).run(args, kwargs)
        self._check()
        return Region(part, function, rule, visit, self._meter).run(args, kwargs)

    def _rule(self, key: Hashable) -> Planned | None:
        """What the plan says of a call; None where all of it is to be made again: it is watched, or waits for that."""
        if self._trace is not None and self._trace.is_lost:
            self._trace = Trace()
        if self._trace is not None and self._trace.is_over:
            self._make_plan(self._trace)
            self._trace = None
        if self._trace is not None:
            return None
        self._open = [each for each in self._open if each[1]() is not None]
        plan = next((each for each in reversed(self._plans) if key in each.rules), None)
        if plan is not None and not self._waits:
            if sum(of == key for of, _ in self._open) < plan.num_in_flight:
                return plan.rules[key]
            self._plans.remove(plan)
        self._waits = bool(self._open)  # for what is in flight, which a trace would not know
        if not self._waits:
            self._trace = Trace()
        return None

    def _check(self) -> None:
        """Say once where more was held than the budget: the blocks did something else than when they were watched."""
        if self.measured_bytes > self.budget_bytes and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"blocks held {self.measured_bytes:,} bytes of activations, over the budget of {self.budget_bytes:,}: "
                "sizes, operators or microbatches in flight are others than in the step that was watched",
                stacklevel=3,
            )

    def _make_plan(self, trace: Trace) -> None:
        calls = _with_least_seconds([call_of(record, self.offload.min_bytes) for record in trace.records])
        places: dict[Hashable, int] = {}  # of each block and its shapes, the first call
        for number, record in enumerate(trace.records):
            places.setdefault(record.signature, number)
        blocks = [calls[number].block for number in places.values()]
        copying = self._copying(trace, calls)
        blocks, copying = agreed(blocks, copying, trace.device, self._axis)
        order = {key: place for place, key in enumerate(places)}
        of_calls = [order[each.signature] for each in trace.records]
        chosen, most = fit(
            blocks, calls, of_calls, trace.events, self.budget_bytes, copying, trace.num_in_flight
        )
        choices = {key: each.choices for key, each in zip(places, chosen.options, strict=True)}
        rules = {key: Planned.of(calls[number], choices[key]) for key, number in places.items()}
        self.plan = ActivationPlan(
            rules,
            trace.num_in_flight,
            most["device"],
            most["host"],
            chosen.added_s,
            tuple(lines(blocks, chosen, self.budget_bytes, most, trace.num_in_flight)),
        )
        self._plans = [*self._plans[1 - _MOST_PLANS :], self.plan]
        self._meter = Holdings()
        if self._report is not None:
            for line in self.plan.table:
                self._report(line)

    def _copying(self, trace: Trace, calls: Sequence[Call]) -> Copying:
        """The rate at which pieces move, tried with one as large as the largest."""
        sizes = [m.num_bytes for call in calls for piece in call.memory for m in piece if m.can_move]
        if not self._moves or not sizes:
            return Copying(moves=False)
        device = trace.device
        host, copies = self.offload.engine(device)
        here = torch.empty(min(max(sizes), _MEASURED_BYTES), dtype=torch.uint8, device=device)
        there = host.empty(here.shape, torch.uint8)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            copies.to_host_start(there, here).wait()
            seconds.append(time.perf_counter() - start)
        host.free(there)
        return Copying(here.nbytes / max(min(seconds), 1e-9), 0.0 if device.type == "cuda" else 1.0)


def plan_activations(
    model: nn.Module,
    budget_bytes: int | str,
    *,
    blocks: Iterable[str] | None = None,
    axis: Axis | None = None,
    offload: bool = True,
    min_bytes: int | str = MIN_BYTES,
    report: Callable[[str], object] | None = None,
) -> ActivationPlanner:
    """Let what a model's blocks keep between forward and backward fit a budget, at the least time that it takes.

        planner = pypar.plan_activations(model, "2GB", report=print)
        ...                                                 # a step as ever; the second one follows the plan
        planner.plan.peak_bytes                             # <= 2e9, exactly what blocks hold at most

    In the first step all blocks are recomputed, with their inputs on the host, and watched: which tensors each of them
    saves, of which operator, how long that takes, when backward needs them. Then each is saved, made again, or moved to
    the host, as takes the least time within the budget, for all later steps. Gradients are the same bits all the while.
    Where shapes change, or more microbatches are in flight than were watched, a step is watched again; plans of earlier
    shapes stay.

    What counts is what the blocks hold: what they keep, what backward makes again, what it brings back. Parameters and
    tensors that need no gradient, what lies outside the blocks, and the working memory of operators do not.

    budget_bytes  a number, or text such as "2GB" or "512MiB"
    blocks        as in `pypar.recompute`
    axis          the ranks that communicate inside blocks, which then choose the same: those of tp, cp and ep
    offload       whether tensors may move to the host; min_bytes: smaller pieces of memory do not
    report        gets the plan's table, line by line

    ValueError: a budget that is no number of bytes; when the second step begins, a budget that no choice meets, with
    the least that one does.
    """
    planner = ActivationPlanner(budget_bytes, axis=axis, offload=offload, min_bytes=min_bytes, report=report)
    planner.add(model, blocks)
    return planner


def _planner(budget_bytes: int, moves: bool, min_bytes: int) -> ActivationPlanner:
    return ActivationPlanner(budget_bytes, offload=moves, min_bytes=min_bytes)


def _signature(part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What a call's saved tensors depend on, as far as it can be told before."""
    autocast = tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
    )
    return (
        part.modules[0].training,
        autocast,
        *(
            (x.shape, x.dtype, x.requires_grad, x.device, x.untyped_storage().nbytes())
            if isinstance(x, Tensor)
            else type(x)
            for x in tree_leaves((args, kwargs))
        ),
    )


def _with_least_seconds(calls: Sequence[Call]) -> list[Call]:
    """The calls, with the least seconds of those that are alike: what disturbed one of them is left out."""
    alike: dict[Hashable, list[BlockCosts]] = {}
    for call in calls:
        alike.setdefault(_kind(call.block), []).append(call.block)
    return [replace(call, block=_least(call.block, alike[_kind(call.block)])) for call in calls]


def _kind(block: BlockCosts) -> Hashable:
    return block.pieces, len(block.calls_s)


def _least(block: BlockCosts, alike: Sequence[BlockCosts]) -> BlockCosts:
    return replace(
        block,
        calls_s=tuple(map(min, zip(*(each.calls_s for each in alike), strict=True))),
        between_s=tuple(map(min, zip(*(each.between_s for each in alike), strict=True))),
        forward_s=min(each.forward_s for each in alike),
        backward_s=min(each.backward_s for each in alike),
    )
