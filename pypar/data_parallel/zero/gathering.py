"""Brings the parameters of units and takes them away: cut, on their way, whole."""

from __future__ import annotations

from collections.abc import Sequence

from pypar.comm import Handle
from pypar.data_parallel.pieces import gather_pieces_start
from pypar.data_parallel.reduction import explained
from pypar.data_parallel.stores.places import Places
from pypar.data_parallel.zero.account import Account
from pypar.data_parallel.zero.members import Group, Unit


class Gathering:
    """The parameters of a store's units, of which each rank keeps its rows.

    Every rank starts the same gathers in the same order.
    """

    def __init__(self, units: Sequence[Unit], account: Account, places: Places) -> None:
        self._units, self._account, self._places = units, account, places
        self._started: dict[Unit, list[tuple[Group, Handle, bool]]] = {}
        for unit in units:
            unit.is_whole = False
            for member in unit.members:
                member.free()

    def start(self, unit: Unit) -> None:
        """Start to gather a unit that is not whole; `wait` ends it."""
        if not unit.is_whole and unit not in self._started:
            rows = [None if unit.has_second else self._places.rows(group) for group in unit.groups]
            self._account.add("gathered", sum(member.whole.nbytes for member in unit.members))
            for member in unit.members:
                member.bring()
            self._started[unit] = []
            for group, own in zip(unit.groups, rows, strict=True):
                if own is None:
                    handle = gather_pieces_start(group.seconds, group.inner_parts(), group.inner)
                else:
                    shares, flat = own
                    handle = gather_pieces_start(shares, group.parts(), group.axis, flat)
                self._started[unit].append((group, handle, own is not None))

    def wait(self, unit: Unit) -> None:
        """Return when the unit is whole."""
        self.start(unit)
        for group, handle, is_of_rows in self._started.pop(unit, []):
            with explained(f"gathering the parameters of {unit.block.name}", group.axis):
                handle.wait()
            if is_of_rows:
                self._places.rows_sent(group)
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


def publish_whole(units: Sequence[Unit], places: Places) -> None:
    """Let each rank's rows become part of the parameters that every rank has whole."""
    started = []
    for group in (group for unit in units for group in unit.trained):
        shares, _ = places.rows(group, publishes=True)
        started.append((group, gather_pieces_start(shares, group.parts(), group.axis)))
        if places.keeps_rows:  # what is on the device is bounded
            _end_gather(*started.pop(), places)
    for group, handle in started:
        _end_gather(group, handle, places)


def _end_gather(group: Group, handle: Handle, places: Places) -> None:
    handle.wait()
    places.rows_sent(group)
