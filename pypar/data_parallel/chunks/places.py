"""Rows of parameters and gradients in chunks, which move as a placement says that was made of the steps before."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pypar.arenas import Arena, Copies
from pypar.data_parallel.chunks.chunk import Chunk
from pypar.data_parallel.chunks.families import Chunked, in_families
from pypar.data_parallel.chunks.placement import CREATE, FETCH, FLUSH, MAKE, READ, WRITE, place
from pypar.data_parallel.chunks.report import told
from pypar.data_parallel.chunks.residents import Choice, Family, choose
from pypar.data_parallel.chunks.trace import Event, Trace
from pypar.data_parallel.zero.members import Group, Member, Unit


class Chunks:
    """The places of a store whose states lie in chunks: see `pypar.data_parallel.stores.places.Places`.

    A step is traced: chunks come when they are used and go at once. When two steps have done the same, the placement
    that `choose` makes of them holds for the steps that follow, until one does something else: from there on chunks
    come when they are used again, and a new placement is made.

    device, host  arenas whose bytes are all those of the store; the device's budget is what chunks have to share
    choice        the placement that holds now, and who the residents are
    num_plans     placements made so far
    """

    keeps_rows = True

    def __init__(self, device: Arena, host: Arena) -> None:
        self.device, self.host, self.copies = device, host, Copies(device.device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.choice: Choice | None = None
        self.num_plans = 0
        self.peak = 0  # of the device, as the placement has it
        self.compulsory = 0  # bytes that any placement without residents moves
        self._beside = 0  # bytes of the device that no chunk takes
        self._trace, self._before = Trace(), None  # type: Trace, Trace | None
        self._plan: dict[int, list[tuple[int, str]]] | None = (
            None  # by moment; None: chunks come and go by use
        )
        self._planned: Trace | None = None
        self._is_aside = False
        self._traced: dict[Event, bool] = {}
        self._touched: set[Chunk] = set()

    def begin(self, units: Sequence[Unit], *, most_bytes: int, is_cut: bool) -> None:
        """Take over where members lie."""
        families, self._of, self.packings = in_families(
            units, self.device, self.host, self.copies, most_bytes=most_bytes, is_cut=is_cut
        )
        self.families = families
        self._chunks: dict[int, Chunk] = {}
        for family in families:
            self._chunks.update(enumerate(family.chunks, family.index))
        for unit in units:
            for group in unit.groups:
                group.gradients = None
        for family in families:
            family.count(None)
        self.device.reset_peak()

    def count(self, num_bytes: int) -> None:
        """Other bytes of the device were taken, or given back where negative."""
        self.device.count(num_bytes)
        self._beside += num_bytes
        self._trace.holds(self._beside)

    # ---- what a store calls

    def rows(self, group: Group, *, publishes: bool = False) -> tuple[list[Tensor], Tensor | None]:
        families = self._families(group)
        self._begin(("rows", group), is_step=self._is_of_step(publishes))
        for family in families:
            self._use(("rows", group), family.index, READ)
        return [_there(family.rows, member.share) for family, member in self._each(group)], None

    def rows_sent(self, group: Group) -> None:
        self._end(("rows", group), [family.index for family in self._families(group)])

    def sums(self, group: Group, *, adds: bool) -> list[Tensor]:
        families = self._families(group)
        self._begin(("sums", group), is_step=True)
        for family in families:
            assert family.sums is not None
            is_new = not adds and family.sums not in self._touched
            self._touched.add(family.sums)
            self._use(("sums", group), family.index + 1, CREATE if is_new else WRITE)
        made = []
        for family, member in self._each(group):
            assert family.sums is not None and member.gradient is not None
            made.append(_there(family.sums, member.gradient))
        return made

    def sums_made(self, group: Group) -> None:
        self._end(("sums", group), [family.index + 1 for family in self._families(group)])

    def settle(self) -> None:
        self._begin("update", is_step=True)
        for family in self.families:
            if family.sums is not None:
                self._trace.on_host(family.index + 1, READ)
                self._trace.on_host(family.index, WRITE)
        for family in self.families:
            if family.sums is not None:
                self._go(family.rows)
                self._go(family.sums)

    def zeroed(self) -> None:
        gone = [f.sums for f in self.families if f.sums is not None and f.sums.is_here and not f.is_resident]
        self._touched.clear()
        if gone:
            self._leave_plan()
            for chunk in gone:
                chunk.forget()

    def changed(self) -> None:
        for chunk in self._chunks.values():
            assert not chunk.num_users, f"{chunk.name} is in use"
            if chunk.is_here and not chunk.is_resident:
                self._leave_plan()
                chunk.forget()

    def end_step(self) -> None:
        """Every chunk goes; the next step goes by the placement of the last ones where there is one."""
        if not self._trace.events or self._is_aside:
            return
        for chunk in self._chunks.values():
            self._go(chunk)
        self._touched.clear()
        for family in self.families:
            family.count(self.optimizer)
        done, self._trace = self._trace, Trace()
        if self._plan is None:
            if self._before is not None and self._before.events == done.events:
                self._make_plan(self._before, done)
            self._before = done
        elif self._planned is not None and len(self._planned.events) != len(done.events):
            self._leave_plan()
            self._before = done

    def restart(self) -> None:
        for chunk in self._chunks.values():
            chunk.forget()
        self._trace, self._before, self._plan = Trace(), None, None
        self._traced.clear()
        self._touched.clear()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    # ---- the placement

    def _make_plan(self, before: Trace, now: Trace) -> None:
        assert self.device.budget_bytes is not None
        most = [max(pair) for pair in zip(before.beside, now.beside, strict=True)]
        sizes = [0] * (max(self._chunks, default=-1) + 1)
        for index, chunk in self._chunks.items():
            sizes[index] = chunk.num_bytes
        movable = [family for family in self.families if family.sums is None or self.optimizer is not None]
        self.choice = choose(
            now.accesses,
            sizes,
            [self.device.budget_bytes - each for each in most],
            [
                Family(
                    tuple(range(family.index, family.index + len(family.chunks))),
                    family.room_apart(self.optimizer),
                )
                for family in movable
            ],
        )
        placement = self.choice.placement
        self.peak = max(held + each for held, each in zip(placement.held, most, strict=True))
        self.compulsory = place(now.accesses, sizes, [sum(sizes)] * len(most)).moved
        for family in movable[: self.choice.families]:
            family.settle_down(self.optimizer)
        self._plan, self._planned = {}, now
        for move in placement.moves:
            self._plan.setdefault(move.moment, []).append((move.chunk, move.kind))
        self.num_plans += 1

    def _leave_plan(self) -> None:
        """Something else happens than was planned: chunks come and go by use until steps repeat again."""
        if self._plan is None:
            return
        warnings.warn(
            f"at event {len(self._trace.events)} this step of the store does something else than the last ones did, so "
            "that chunks move when they are used; a new placement is made when two steps have done the same",
            stacklevel=2,
        )
        self._plan = self._planned = self._before = self.choice = None
        for family in self.families:
            if family.is_resident:
                family.move_out(self.optimizer)
        for chunk in self._chunks.values():
            if not chunk.num_users:
                self._go(chunk)

    def lines(self) -> list[str]:
        """The placement in words; before there is one, how states are packed."""
        return told(self)

    # ---- moments

    def _is_of_step(self, publishes: bool) -> bool:
        """Whether what happens now belongs to what each step repeats: a forward without gradients does not."""
        is_backward = torch._C._current_graph_task_id() != -1
        is_update = publishes and bool(self._trace.events)  # else a checkpoint was read
        return not self._is_aside and (is_update or is_backward or torch.is_grad_enabled())

    def _families(self, group: Group) -> list[Chunked]:
        return list(dict.fromkeys(self._of[member] for member in group.members))

    def _each(self, group: Group) -> Iterator[tuple[Chunked, Member]]:
        return ((self._of[member], member) for member in group.members)

    def _begin(self, event: Event, *, is_step: bool) -> None:
        self._traced[event] = is_step
        if not is_step:
            if self._plan is not None and self._trace.events:
                self._leave_plan()
            return
        self._moment(event)

    def _moment(self, event: Event) -> None:
        moment = self._trace.begin(event, self._beside)
        self._follow(event, moment)

    def _follow(self, event: Event, moment: int) -> None:
        """Make the moves that the placement has for this moment, if it is as planned."""
        if self._plan is None or self._planned is None:
            return
        if self._planned.events[moment : moment + 1] != [event]:
            self._leave_plan()
            return
        for index, kind in self._plan.get(moment, ()):
            chunk = self._chunks[index]
            if kind == FETCH:
                chunk.fetch()
            elif kind == MAKE:
                chunk.make()
            elif kind == FLUSH:
                chunk.flush()
            else:
                chunk.drop()

    def _use(self, user: Event, index: int, kind: str) -> None:
        chunk = self._chunks[index]
        if self._traced[user]:
            self._trace.use(user, index, kind)
        if not chunk.is_here:
            if kind == CREATE:
                chunk.make()
            else:
                chunk.fetch()
        chunk.use(writes=kind != READ)

    def _end(self, user: Event, indexes: Sequence[int]) -> None:
        is_step = self._traced.pop(user, False)
        for index in indexes:
            self._chunks[index].release()
        if is_step:
            event = ("end", user)
            moment = self._trace.begin(event, self._beside)
            for index in indexes:
                self._trace.release(user, index)
            self._follow(event, moment)
        if self._plan is None or not is_step:
            for index in indexes:
                if not self._chunks[index].num_users:
                    self._go(self._chunks[index])

    def _go(self, chunk: Chunk) -> None:
        """Let the host have it, and the device not."""
        if chunk.is_here and not chunk.is_resident:
            chunk.flush()
            chunk.drop()


def _there(chunk: Chunk, like: Tensor) -> Tensor:
    """What lies on the device where this tensor lies at home."""
    begin = like.storage_offset()
    return like if chunk.is_resident else chunk.there[begin : begin + like.numel()].view(like.shape)
