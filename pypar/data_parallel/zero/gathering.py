"""Brings the parameters of units and takes them away: cut, on their way, whole."""

from __future__ import annotations

from collections.abc import Sequence

from pypar.comm import Handle
from pypar.data_parallel.pieces import gather_pieces_start
from pypar.data_parallel.reduction import explained
from pypar.data_parallel.zero.account import Account
from pypar.data_parallel.zero.members import Group, Unit


class Gathering:
    """The parameters of a store's units, of which each rank keeps its rows.

    Every rank starts the same gathers in the same order.
    """

    def __init__(self, units: Sequence[Unit], account: Account) -> None:
        self._units, self._account = units, account
        self._started: dict[Unit, list[tuple[Group, Handle]]] = {}
        for unit in units:
            unit.is_whole = False
            for member in unit.members:
                member.free()

    def start(self, unit: Unit) -> None:
        """Start to gather a unit that is not whole; `wait` ends it."""
        if not unit.is_whole and unit not in self._started:
            self._started[unit] = []
            for member in unit.members:
                member.bring()
            self._account.add("gathered", sum(member.whole.nbytes for member in unit.members))
            for group in unit.groups:
                if unit.has_second:
                    handle = gather_pieces_start(group.seconds, group.inner_parts(), group.inner)
                else:
                    handle = gather_pieces_start(group.shares(), group.parts(), group.axis, group.flat)
                self._started[unit].append((group, handle))

    def wait(self, unit: Unit) -> None:
        """Return when the unit is whole."""
        self.start(unit)
        for group, handle in self._started.pop(unit, []):
            with explained(f"gathering the parameters of {unit.block.name}", group.axis):
                handle.wait()
        unit.is_whole = True

    def free(self, unit: Unit, *, keeps_second: bool = False) -> None:
        """Give the memory of a unit's parameters back, unless something holds it.

        keeps_second: this rank keeps its rows over the inner axis, from which the next gather comes.
        """
        if unit.has_second and not keeps_second and not unit.holds:
            self._drop_seconds(unit)
        if not unit.holds and unit.is_whole:
            if keeps_second and not unit.has_second:
                self._keep_seconds(unit)
            unit.is_whole = False
            for member in unit.members:
                member.free()
            self._account.add("gathered", -sum(member.whole.nbytes for member in unit.members))

    def _keep_seconds(self, unit: Unit) -> None:
        for group in unit.groups:
            group.seconds = [x.clone() for x in group.inner_parts()[group.inner.rank]]
            self._account.add("gathered", sum(x.nbytes for x in group.seconds))
        unit.has_second = True

    def _drop_seconds(self, unit: Unit) -> None:
        for group in unit.groups:
            self._account.add("gathered", -sum(x.nbytes for x in group.seconds))
            group.seconds = []
        unit.has_second = False

    def settle(self) -> None:
        """Wait for what is on its way."""
        for unit in list(self._started):
            self.wait(unit)

    def refresh(self) -> None:
        """Shares have new values: what is held is gathered anew, all else is freed."""
        for unit in self._units:
            holds, unit.holds = unit.holds, 0
            self.free(unit)
            unit.holds = holds
        self.free_all()
        for unit in self._units:
            if unit.holds:
                self.wait(unit)

    def free_all(self) -> None:
        """Let go of everything, also of what is on its way."""
        self.settle()
        for unit in self._units:
            self.free(unit)


class Kept:
    """Parameters that are whole always: nothing comes or goes."""

    def start(self, unit: Unit) -> None:
        pass

    wait = start

    def free(self, unit: Unit, *, keeps_second: bool = False) -> None:
        pass

    def settle(self) -> None:
        pass

    free_all = refresh = settle
