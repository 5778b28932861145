"""What a plan is made of: the pieces of memory of each block, what they cost to keep, to make again, to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SAVE, OFFLOAD, RECOMPUTE = "save", "offload", "recompute"
INPUT, OTHER = "input", "other"  # names of pieces that no operator returned


@dataclass(frozen=True)
class Piece:
    """Memory about which one choice is made: an input of a block, what one operator returned, another saved tensor.

    name           of the operator, or INPUT, or OTHER
    saved_bytes    that backward needs: in the block's backward they are on the device whatever is chosen
    extra_bytes    that only a forward which runs again needs; of an input they are kept only where one does
    moved_bytes    of both, what is large enough to be moved to the host
    call           the operator's place among the block's calls; None: no operator, and to keep it saves no call
    until          the calls that a forward which makes it again has come to: those before it are computed
    """

    name: str
    saved_bytes: int
    extra_bytes: int = 0
    moved_bytes: int = 0
    call: int | None = None
    until: int = 0

    @property
    def num_bytes(self) -> int:
        return self.saved_bytes + self.extra_bytes

    def choices(self, *, moves: bool) -> Sequence[str]:
        """What can be done with it: an input can not be made again."""
        found = (SAVE,) if self.name == INPUT else (SAVE, RECOMPUTE)
        return (*found, OFFLOAD) if moves and self.moved_bytes else found


@dataclass(frozen=True)
class BlockCosts:
    """One block: its pieces, the seconds of its calls, and of what lies before each call and after the last one.

    forward_s, backward_s: of the whole block, beside which copies of its neighbours travel. stays: nothing of it moves,
    as its backward comes right after its forward.
    """

    pieces: tuple[Piece, ...]
    calls_s: tuple[float, ...] = ()
    between_s: tuple[float, ...] = (0.0,)
    forward_s: float = 0.0
    backward_s: float = 0.0
    stays: bool = False
    name: str = field(default="", compare=False)

    def again_s(self, until: int) -> float:
        """The seconds of a forward that runs again up to a call, without the calls themselves."""
        last = self.between_s[until:] if until == len(self.calls_s) else ()
        return sum(self.between_s[:until]) + sum(last)

    @property
    def saved_bytes(self) -> int:
        """What backward needs of it."""
        return sum(piece.saved_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Copying:
    """How fast memory moves between device and host, each way.

    own_share: of the time of a copy, how much the device computes that much less: 0 where a copy hides behind what is
    computed beside it, 1 where hiding saves nothing, as on a CPU. moves: whether anything may be moved.
    """

    bytes_per_s: float = 4e9
    own_share: float = 1.0
    moves: bool = True

    def added_s(self, num_bytes: int, beside_s: float) -> float:
        """The seconds that a copy adds to what is computed beside it."""
        copy_s = num_bytes / self.bytes_per_s
        return self.own_share * copy_s + (1 - self.own_share) * max(0.0, copy_s - beside_s)
