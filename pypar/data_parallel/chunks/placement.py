"""What moves when: a pure function of the accesses of one iteration, sizes and room on the device.

Every chunk has memory on the host for good, and on the device while a copy of it is there. A copy that was not written
since it came goes for nothing; what was written is copied back once. Where room is needed, the copy goes whose next use
is farthest (Belady, 1966), which makes the fewest copies to the device where chunks are of one size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

READ, WRITE, CREATE = "read", "write", "create"
DEVICE, HOST = "device", "host"
FETCH, MAKE, FLUSH, DROP = "fetch", "make", "flush", "drop"


@dataclass(frozen=True)
class Access:
    """A chunk is used from a moment to another one, both included.

    place  DEVICE, or HOST, where the whole of the access is one moment
    kind   READ; WRITE, which reads too; CREATE: every byte of it is written that is read later
    """

    moment: int
    chunk: int
    place: str = DEVICE
    kind: str = READ
    until: int = -1  # the moment itself

    @property
    def last(self) -> int:
        return max(self.moment, self.until)


@dataclass(frozen=True)
class Move:
    """What is started when a moment begins, in the order of the list.

    FETCH  takes memory of the device and copies the chunk there
    MAKE   takes memory of the device without values
    FLUSH  copies what was written on the device back, which stays there
    DROP   gives memory of the device back, of what the host has too
    """

    moment: int
    chunk: int
    kind: str


class CannotBeError(ValueError):
    """The room does not hold what one moment needs."""

    def __init__(self, moment: int, least: int, room: int) -> None:
        super().__init__(
            f"moment {moment} needs {least:,} bytes of chunks on the device, and has room for {room:,}"
        )
        self.moment, self.least, self.room = moment, least, room


@dataclass
class Placement:
    """The moves of an iteration and what they come to. held: bytes of chunks on the device at each moment."""

    moves: list[Move] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    to_device: int = 0
    to_host: int = 0

    @property
    def moved(self) -> int:
        return self.to_device + self.to_host


def place(
    accesses: Sequence[Access],
    sizes: Sequence[int],
    room: Sequence[int],
    *,
    residents: Collection[int] = (),
    ahead: bool = True,
) -> Placement:
    """Moves that serve every access and never hold more than there is room for.

    accesses   of one iteration, which begins with all values on the host
    sizes      bytes of each chunk
    room       bytes of the device for chunks, at each moment
    residents  chunks that lie on the device for good: they take room at every moment and never move
    ahead      chunks of the next moment are fetched in this one where that costs no copy more

    CannotBeError where a moment's own chunks do not fit. ValueError for a chunk that is used in both places at once.
    """
    taken = sum(sizes[chunk] for chunk in residents)
    moving = [access for access in accesses if access.chunk not in residents]
    return _Plan(moving, sizes, [each - taken for each in room], ahead).made(taken)


def least_room(accesses: Sequence[Access], sizes: Sequence[int], num_moments: int) -> list[int]:
    """Bytes of the chunks that each moment itself uses on the device."""
    used: list[set[int]] = [set() for _ in range(num_moments)]
    for access in accesses:
        if access.place == DEVICE:
            for moment in range(access.moment, access.last + 1):
                used[moment].add(access.chunk)
    return [sum(sizes[chunk] for chunk in chunks) for chunks in used]


class _Plan:
    """One iteration, gone through moment by moment."""

    def __init__(
        self, accesses: Sequence[Access], sizes: Sequence[int], room: Sequence[int], ahead: bool
    ) -> None:
        self.sizes, self.room, self.ahead = sizes, room, ahead
        self.of_chunk: dict[int, list[Access]] = {}
        self.starting: list[list[Access]] = [[] for _ in room]
        self.used: list[dict[int, None]] = [{} for _ in room]  # on the device, in the order of their starts
        for access in sorted(accesses, key=lambda each: each.moment):
            self.of_chunk.setdefault(access.chunk, []).append(access)
            self.starting[access.moment].append(access)
            if access.place == DEVICE:
                for moment in range(access.moment, access.last + 1):
                    self.used[moment][access.chunk] = None
        for access in accesses:
            if access.place == HOST and access.chunk in self.used[access.moment]:
                raise ValueError(
                    f"chunk {access.chunk} is used on the host and on the device at moment {access.moment}; let one of "
                    "them come after the other"
                )
        self.here: dict[int, bool] = {}  # chunks on the device: whether they were written since they came
        self.done = Placement()

    def made(self, taken: int) -> Placement:
        for moment, room in enumerate(self.room):
            needed = sum(self.sizes[chunk] for chunk in self.used[moment])
            if needed > room:
                raise CannotBeError(moment, needed + taken, room + taken)
            self._before(moment)
            for chunk in self._victims(moment, self.used[moment], self.room[moment]):
                self._go(chunk, moment)
            self._bring(moment)
            for access in self.starting[moment]:
                if access.place == DEVICE and access.kind != READ:
                    self.here[access.chunk] = True
            if self.ahead:
                self._ahead(moment)
            self.done.held.append(taken + self._held())
        for chunk in sorted(self.here):
            self._go(chunk, len(self.room))
        return self.done

    def _held(self) -> int:
        return sum(self.sizes[chunk] for chunk in self.here)

    def _add(self, moment: int, chunk: int, kind: str) -> None:
        self.done.moves.append(Move(moment, chunk, kind))
        if kind == FETCH:
            self.done.to_device += self.sizes[chunk]
        elif kind == FLUSH:
            self.done.to_host += self.sizes[chunk]

    def _before(self, moment: int) -> None:
        """What was written and is next read by the host goes there at once; what the host will write over goes."""
        for chunk, is_written in list(self.here.items()):
            if chunk in self.used[moment]:
                continue
            following = self._next(chunk, moment)
            if is_written and following is not None and following.place == HOST and following.kind != CREATE:
                self._add(moment, chunk, FLUSH)
                self.here[chunk] = False
            if self.next_use(chunk, moment) == math.inf:
                self._go(chunk, moment)

    def _next(self, chunk: int, moment: int) -> Access | None:
        return next((access for access in self.of_chunk[chunk] if access.moment >= moment), None)

    def next_use(self, chunk: int, moment: int) -> float:
        """When what the device has of a chunk is used again; infinite where it is written anew before."""
        for access in self.of_chunk[chunk]:
            if access.moment >= moment:
                if access.place == DEVICE:
                    return math.inf if access.kind == CREATE else access.moment
                if access.kind != READ:
                    return math.inf
        return math.inf

    def _go(self, chunk: int, moment: int) -> None:
        following = self._next(chunk, moment)
        is_dead = following is not None and following.kind == CREATE
        if self.here.pop(chunk) and not is_dead:
            self._add(moment, chunk, FLUSH)
        self._add(moment, chunk, DROP)

    def _victims(self, moment: int, used: dict[int, None], room: int) -> list[int]:
        """Chunks to go so that what a moment uses has room, farthest use first; of equal ones unwritten, large ones."""
        coming = sum(self.sizes[chunk] for chunk in used if chunk not in self.here)
        over = self._held() + coming - room
        idle = [chunk for chunk in self.here if chunk not in used]
        idle.sort(key=lambda c: (-self.next_use(c, moment), self.here[c], -self.sizes[c], c))
        victims = []
        for chunk in idle:
            if over <= 0:
                break
            victims.append(chunk)
            over -= self.sizes[chunk]
        return victims

    def _bring(self, moment: int) -> None:
        kinds = self._first_kinds(moment)
        for chunk in self.used[moment]:
            if chunk not in self.here:
                self._add(moment, chunk, MAKE if kinds[chunk] == CREATE else FETCH)
                self.here[chunk] = False

    def _first_kinds(self, moment: int) -> dict[int, str]:
        """Of chunks whose use on the device begins at a moment: what the first use does."""
        starting = reversed(self.starting[moment])
        return {access.chunk: access.kind for access in starting if access.place == DEVICE}

    def _ahead(self, moment: int) -> None:
        """Fetch for the next moment now, where it makes room now by the same chunks as it would then.

        What is created there, or written by the host before, cannot come early.
        """
        following = moment + 1
        if following >= len(self.room):
            return
        kinds = self._first_kinds(following)
        rewritten = {
            access.chunk
            for access in (*self.starting[moment], *self.starting[following])
            if access.place == HOST and access.kind != READ
        }
        coming = [
            chunk
            for chunk in self.used[following]
            if chunk not in self.here and kinds[chunk] != CREATE and chunk not in rewritten
        ]
        victims = self._victims(following, self.used[following], self.room[following])
        freed = sum(self.sizes[chunk] for chunk in victims)
        after = self._held() - freed + sum(self.sizes[chunk] for chunk in coming)
        if not coming or after > self.room[moment] or any(c in self.used[moment] for c in victims):
            return
        for chunk in victims:
            self._go(chunk, moment)
        for chunk in coming:
            self._add(moment, chunk, FETCH)
            self.here[chunk] = False
