"""Gradients of units: added up whole, then each rank gets the sum of its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pypar.comm import Handle, all_reduce_start, shared_empty
from pypar.data_parallel.arrivals import Hook
from pypar.data_parallel.pieces import reduce_pieces_start
from pypar.data_parallel.reduction import explained
from pypar.data_parallel.stores.places import Places
from pypar.data_parallel.zero.account import Account
from pypar.data_parallel.zero.members import Group, Member, Unit
from pypar.grid import TIED
from pypar.layout import local_tensor
from pypar.mesh import Axis

# Reductions whose whole gradients are held while the next ones are computed.
_MOST_IN_FLIGHT = 1


@dataclass(eq=False)
class _Started:
    """A group whose reduction is under way."""

    unit: Unit
    group: Group
    handle: Handle
    out: list[Tensor]  # this rank's rows
    more: list[Tensor] | None  # what is added to rows that hold a sum already
    transient: int = 0  # bytes
    whole: int = 0  # bytes of gradients that go when it is done


class Reducing:
    """Takes in what backward adds to parameters' ``grad`` and sums it over ranks, a unit at a time.

    keeps_whole  whole gradients have memory that stays; a rank's rows are a part of it. Otherwise they are there from
                 the first gradient that arrives to the unit's reduction
    factor       what sums are multiplied by at the end
    """

    def __init__(
        self, units: Sequence[Unit], account: Account, places: Places, *, keeps_whole: bool, factor: float
    ) -> None:
        self._account, self._places = account, places
        self._units = [unit for unit in units if unit.trained]
        self._keeps_whole, self._factor = keeps_whole, factor
        self._of = {m.parameter: (m, unit) for unit in units for g in unit.trained for m in g.members}
        self._in_flight: deque[_Started] = deque()
        self._has_sum: set[Unit] = set()  # whose rows hold a sum of this step
        self.num_arrived = 0  # gradients since zero()
        self.is_final = False
        self.is_broken = False  # a backward has failed after others had added to the gradients
        self._num_before = 0
        for unit in self._units:
            for group in unit.trained:
                _make_gradients(group, keeps_whole)
        hook = Hook(self._reached)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._of]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _reached(self, parameter: nn.Parameter) -> None:
        self._take_in(*self._of[parameter])

    def _take_in(self, member: Member, unit: Unit) -> None:
        grad = member.parameter.grad
        if grad is None:
            return
        self._refuse(member, unit, grad)
        member.parameter.grad = None
        grad = local_tensor(grad).detach()
        grad = grad.to_dense() if grad.is_sparse else grad
        assert member.gradient is not None
        if member.accumulated is None:
            grad = grad.to(member.gradient.dtype).contiguous()
            self._account.add("gradients", grad.nbytes)
            member.accumulated = grad
        else:
            member.accumulated.add_(grad)
        self.num_arrived += 1

    def _refuse(self, member: Member, unit: Unit, grad: Tensor) -> None:
        where = f"the gradient of {member.name} {tuple(member.parameter.shape)}"
        if not local_tensor(member.parameter).is_set_to(member.whole):
            raise RuntimeError(
                f"{member.name} was converted or moved (model.to(), half(), double()) after its store was made, and "
                "would not be updated; convert the model first"
            )
        if grad.requires_grad:
            raise RuntimeError(
                f"{where} was made with create_graph=True, and what is reduced has no graph; use "
                "torch.autograd.grad(..., create_graph=True) for a gradient's gradient, then backward() without it"
            )
        if self.is_broken:
            raise RuntimeError(
                f"an earlier backward of this step has failed, and {where} would be added to a part of its own; call "
                "store.zero_grad() and begin the step anew"
            )
        if self.is_final:
            if all(m.master is not None and m.master.grad is None for m, _ in self._of.values()):
                self.zero()  # optimizer.zero_grad() has said so
                return
            raise RuntimeError(
                f"backward added to the sum that the last step left in {where}; call store.zero_grad() before each "
                "step's first backward, and put all but the step's last backward under `with store.accumulate():`"
            )
        if unit.is_reduced:
            raise RuntimeError(
                f"backward reached {member.name} again after its gradient was handed to communication; put all but the "
                "step's last backward under `with store.accumulate():`"
            )

    @torch.no_grad()
    def start(self, unit: Unit, *, is_last: bool = True) -> None:
        """Start to reduce what has been added up; what did not take part counts as zero.

        is_last: nothing more comes in this step; otherwise the sum is added to those that come later.
        """
        for group in unit.trained:
            for member in group.members:
                self._take_in(member, unit)  # what came without a backward that reached the parameter
            self._start(unit, group)
        self._has_sum.add(unit)
        unit.is_reduced = is_last
        while len({started.unit for started in self._in_flight}) > _MOST_IN_FLIGHT:
            self._wait_first()

    def _start(self, unit: Unit, group: Group) -> None:
        wholes = [_whole_gradient(member) for member in group.members]
        parts = [
            [m.each(x)[rank] for m, x in zip(group.members, wholes, strict=True)]
            for rank in range(group.axis.size)
        ]
        zeros = [x for m, x in zip(group.members, wholes, strict=True) if m.accumulated is None]
        if self._keeps_whole and group.axis.size == 1:  # they are there
            return
        out = self._places.sums(group, adds=unit in self._has_sum)
        more = [torch.empty_like(x) for x in out] if unit in self._has_sum else None
        started = _Started(unit, group, reduce_pieces_start(parts, more or out, group.axis), out, more)
        started.transient = sum(x.nbytes for x in (*zeros, *(more or ())))
        self._account.add("transient", started.transient)
        if not self._keeps_whole:
            started.whole = sum(x.nbytes for x in wholes) - sum(x.nbytes for x in zeros)
            for member in group.members:
                member.accumulated = None  # the handle holds it
        self._in_flight.append(started)

    def _wait_first(self) -> None:
        first = self._in_flight.popleft()
        with explained(f"the reduction of gradients of {first.unit.block.name}", first.group.axis):
            first.handle.wait()
        if first.more is not None:
            torch._foreach_add_(first.out, first.more)
        self._places.sums_made(first.group)
        self._account.add("transient", -first.transient)
        self._account.add("gradients", -first.whole)

    def begin(self) -> None:
        """A backward begins."""
        self._num_before = self.num_arrived

    def abandon(self) -> None:
        """The backward that began has failed: what it left of gradients is nothing to go on with."""
        self.wait()
        if self._num_before or self.is_final:
            self.is_broken = True  # so is what earlier ones had added up
        else:
            self.zero()

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what is left, wait for all; every gradient is now final."""
        if self._of and not self.num_arrived and all(p.grad is None for p in self._of):
            raise RuntimeError(
                "gradients were to be reduced, but no backward reached the parameters since the last step; call "
                "loss.backward() first"
            )
        for unit in reversed(self._units):
            if not unit.is_reduced:
                self.start(unit)
        self.wait()
        self._sum_between_groups()
        self._places.settle()
        if self._factor != 1.0:
            torch._foreach_mul_(
                [x for unit in self._units for group in unit.trained for x in group.sums()], self._factor
            )
        self._show()
        self.is_final = True

    def _sum_between_groups(self) -> None:
        handles = []
        for unit in reversed(self._units):
            for group in unit.trained:
                if group.outer.size > 1:
                    rows = self._places.sums(group, adds=True)
                    lying = rows if group.gradients is None else [group.gradients]
                    handles.append((group, [all_reduce_start(x, group.outer) for x in lying if x.numel()]))
                    if self._places.keeps_rows:  # what is on the device is bounded
                        self._end_sums(*handles.pop())
        for group, started in handles:
            self._end_sums(group, started)

    def _end_sums(self, group: Group, started: list[Handle]) -> None:
        with explained("the sum of gradients between groups of ranks", group.outer):
            for handle in started:
                handle.wait()
        self._places.sums_made(group)

    def wait(self) -> None:
        """Wait for the reductions that were started."""
        while self._in_flight:
            self._wait_first()

    @torch.no_grad()
    def zero(self) -> None:
        """Set all gradients to zero, and begin a step."""
        self.wait()
        for member, unit in self._of.values():
            member.parameter.grad = None
            unit.is_reduced = False
            assert member.gradient is not None
            member.gradient.zero_()
            if member.accumulated is not None and self._keeps_whole:
                member.accumulated.zero_()
            elif member.accumulated is not None:
                self._account.add("gradients", -member.accumulated.nbytes)
                member.accumulated = None
        self._has_sum.clear()
        self._places.zeroed()
        self.num_arrived, self.is_final, self.is_broken = 0, False, False
        self._show()

    def _show(self) -> None:
        for member, _ in self._of.values():
            if member.master is not None:
                member.master.grad = member.gradient


def _make_gradients(group: Group, keeps_whole: bool) -> None:
    kept = [member.master.data for member in group.members if member.master is not None]
    is_whole = keeps_whole and group.axis.size == 1
    if is_whole or not keeps_whole:
        # Two stages of a pipeline make what they share in other orders, and would wait for each other.
        together = Axis.single("none") if TIED in group.outer.names else group.outer
        numel = sum(x.numel() for x in kept)
        group.gradients = shared_empty(numel, kept[0].dtype, together, kept[0].device).zero_()
    begin = 0
    for member, master in zip(group.members, kept, strict=True):
        if group.gradients is None:
            member.accumulated = torch.zeros_like(member.whole, dtype=master.dtype)
            member.gradient = member.own(member.accumulated)
        else:
            member.gradient = group.gradients[begin : begin + master.numel()].view(master.shape)
            begin += master.numel()
            member.accumulated = member.gradient if is_whole else None
        assert member.master is not None
        member.master.grad = member.gradient


def _whole_gradient(member: Member) -> Tensor:
    """What was added up, or zeros."""
    if member.accumulated is not None:
        return member.accumulated
    assert member.gradient is not None
    return member.gradient.new_zeros(member.whole.shape)
