"""The vocabulary of a pipeline schedule: actions, what they need, what passes between stages, placements.

The model is cut into stages 0 .. num_stages-1. A microbatch goes through all of them along one path. Most
schedules have one path; a bidirectional one (Chimera, DualPipe) has two, and so a second copy of every stage.
A placement says which rank holds each stage of each path; a rank may hold several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

FORWARD = "F"
BACKWARD = "B"  # input gradient and weight gradient together
INPUT_GRADIENT = "I"
WEIGHT_GRADIENT = "W"
UPDATE = "U"
KINDS = (FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE)

ACTIVATION = "activation"  # travels to the next stage
GRADIENT = "gradient"  # travels to the previous one

Place = tuple[int, int]  # (path, stage)


class Action(NamedTuple):
    """One piece of work of one stage; `kind` is one of `KINDS`.

    Microbatches are numbered over all paths together, and each goes along one path. U updates the weights of
    its stage by the gradients of all microbatches up to its own that no earlier U of the stage took in; a
    schedule whose optimizer steps after the list has none.
    """

    kind: str
    stage: int
    microbatch: int
    path: int = 0

    @property
    def place(self) -> Place:
        """The stage and its path."""
        return self.path, self.stage

    @property
    def whose(self) -> str:
        """The stage and microbatch in words; the path too, where it is not the first."""
        path = f"path {self.path}, " if self.path else ""
        return f"{path}stage {self.stage}, microbatch {self.microbatch}"

    def __str__(self) -> str:
        return f"{self.kind}({self.whose})"


class Message(NamedTuple):
    """What one stage hands to a neighbour for one microbatch. `stage` is the receiving stage."""

    kind: str  # ACTIVATION or GRADIENT
    stage: int
    microbatch: int
    path: int = 0

    @property
    def sender(self) -> Place:
        """The stage that makes this message."""
        return self.path, self.stage - 1 if self.kind == ACTIVATION else self.stage + 1

    @property
    def receiver(self) -> Place:
        """The stage that takes this message."""
        return self.path, self.stage


@dataclass(frozen=True)
class Schedule:
    """What each rank runs, in order, and where the stages are.

    `lists[rank]` are that rank's actions. `placement` is {(path, stage): rank}, for the stages 0 ..
    num_stages-1 of every path. A value of this type may be wrong; `validate` says whether it can run.

    pairs: (rank, position) of each action that runs as one with the action behind it, a forward beside a backward
        of another microbatch, so that the communication of one hides behind the computation of the other.
    num_segments: into how many segments every sequence is cut. Segment s of a sequence that is cut into k is
        microbatch i k + s; it needs what the earlier segments computed, and its backward that of the later ones.
    delays: {(path, stage): by how many updates the weights of a microbatch are older than those that an optimizer
        would have that steps after every batch}, of a schedule with updates (U); 0 where it is not named.
    """

    lists: tuple[tuple[Action, ...], ...]
    placement: Mapping[Place, int]
    pairs: frozenset[tuple[int, int]] = frozenset()
    num_segments: int = 1
    delays: Mapping[Place, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        lists: Iterable[Iterable[Action]],
        placement: Mapping[Place, int] | None = None,
        *,
        pairs: Collection[tuple[int, int]] = (),
        num_segments: int = 1,
        delays: Mapping[Place, int] | None = None,
    ) -> Schedule:
        """A schedule from any lists; a stage without a placement is on the first rank whose list names it."""
        fixed = tuple(tuple(actions) for actions in lists)
        found = dict(placement or {})
        if placement is None:
            for rank, actions in enumerate(fixed):
                for action in actions:
                    found.setdefault(action.place, rank)
        return cls(fixed, dict(sorted(found.items())), frozenset(pairs), num_segments, dict(delays or {}))

    @property
    def num_ranks(self) -> int:
        """The number of lists."""
        return len(self.lists)

    @cached_property
    def num_stages(self) -> int:
        """The number of stages of a path."""
        return 1 + max((stage for _, stage in self.placement), default=-1)

    @cached_property
    def num_paths(self) -> int:
        """1, or 2 where microbatches go through the ranks in both directions."""
        return 1 + max((path for path, _ in self.placement), default=-1)

    @cached_property
    def num_microbatches(self) -> int:
        """The largest microbatch that an action names, plus one; 0 when there is no action."""
        return 1 + max((action.microbatch for actions in self.lists for action in actions), default=-1)

    @property
    def stages_per_rank(self) -> int:
        """How many stages of one path share the layers that a rank would have with one."""
        return max(1, -(-self.num_stages // max(1, self.num_ranks)))

    def first(self, num_microbatches: int) -> Schedule:
        """This schedule without the microbatches from `num_microbatches` on; what could run still can."""
        kept = [
            [position for position, action in enumerate(actions) if action.microbatch < num_microbatches]
            for actions in self.lists
        ]
        pairs = {
            (rank, after)
            for rank, positions in enumerate(kept)
            for after, (this, behind) in enumerate(zip(positions, positions[1:], strict=False))
            if (rank, this) in self.pairs and behind == this + 1
        }
        lists = [
            [a[position] for position in positions] for a, positions in zip(self.lists, kept, strict=True)
        ]
        return replace(self, lists=tuple(map(tuple, lists)), pairs=frozenset(pairs))

    def stages_of(self, rank: int) -> list[Place]:
        """The (path, stage)s that `rank` holds, sorted."""
        return sorted(place for place, holder in self.placement.items() if holder == rank)

    def sent_by(self, action: Action) -> Message | None:
        """The message that `action` makes for another stage, None at the ends of the pipeline and for W, U."""
        kind, stage, microbatch, path = action
        if kind == FORWARD and stage + 1 < self.num_stages:
            return Message(ACTIVATION, stage + 1, microbatch, path)
        if kind in (BACKWARD, INPUT_GRADIENT) and stage > 0:
            return Message(GRADIENT, stage - 1, microbatch, path)
        return None

    def needed_by(self, action: Action) -> Message | None:
        """The message that `action` takes from another stage, None where it needs nothing from one."""
        kind, stage, microbatch, path = action
        if kind == FORWARD and stage > 0:
            return Message(ACTIVATION, stage, microbatch, path)
        if kind in (BACKWARD, INPUT_GRADIENT) and stage + 1 < self.num_stages:
            return Message(GRADIENT, stage, microbatch, path)
        return None

    def local_dependencies(self, action: Action) -> list[tuple[Action, ...]]:
        """What must have run before on the same stage; of each tuple one action is enough.

        F for B and I, I for W, B or W for U, and with segments the forward of the segment before, the backward of the
        one behind.
        """
        found = [local_dependency(action)]
        segment = action.microbatch % self.num_segments
        if action.kind == FORWARD and segment > 0:
            found.append((action._replace(microbatch=action.microbatch - 1),))
        if action.kind in (BACKWARD, INPUT_GRADIENT) and segment < self.num_segments - 1:
            behind = action._replace(microbatch=action.microbatch + 1)
            found.append((behind._replace(kind=BACKWARD), behind._replace(kind=INPUT_GRADIENT)))
        return [needed for needed in found if needed]


def local_dependency(action: Action) -> tuple[Action, ...]:
    """What must have run before on the same stage and microbatch: F for B and I, I for W, B or W for U.

    Any one of them is enough; () for F.
    """
    before = {
        BACKWARD: (FORWARD,),
        INPUT_GRADIENT: (FORWARD,),
        WEIGHT_GRADIENT: (INPUT_GRADIENT,),
        UPDATE: (BACKWARD, WEIGHT_GRADIENT),
    }
    return tuple(action._replace(kind=kind) for kind in before.get(action.kind, ()))
