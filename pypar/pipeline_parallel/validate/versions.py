"""Which version of its weights a stage uses for a microbatch, where updates are part of the schedule.

Version n is what n updates have made of the weights that a list begins with. The updates of a stage cut its
microbatches into batches 0, 1, ...: each takes in all up to its own. A synchronous optimizer would compute batch k
with version k; a stage whose delay is d computes it with version max(0, k - d), in the forward and in the backward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
    Place,
    Schedule,
)
from pypar.pipeline_parallel.validate.fault import fault


def updates_of(schedule: Schedule) -> dict[Place, list[int]]:
    """The microbatches of each stage's updates, in the order of its list; without those that have no update."""
    found: dict[Place, list[int]] = {}
    for actions in schedule.lists:
        for action in actions:
            if action.kind == UPDATE:
                found.setdefault(action.place, []).append(action.microbatch)
    return found


def version_used(schedule: Schedule, updates: Mapping[Place, list[int]], action: Action) -> int:
    """The version of the weights that a forward or backward takes; `updates` from `updates_of`."""
    batch = bisect_left(updates.get(action.place, []), action.microbatch)
    return max(0, batch - schedule.delays.get(action.place, 0))


def weight_versions(schedule: Schedule) -> list[int]:
    """The most versions of one stage's weights that each rank keeps at once: 1 without updates.

    A version is kept while a microbatch needs it whose backward has not ended, begun or not.
    """
    updates = updates_of(schedule)
    if not updates:
        return [1] * schedule.num_ranks
    most = []
    for actions in schedule.lists:
        needed: list[
            int
        ] = []  # behind each action, by its stage: the oldest version that is still to be used
        oldest: dict[Place, int] = {}
        for action in reversed(actions):
            version = version_used(schedule, updates, action)
            needed.append(oldest.get(action.place, len(updates.get(action.place, ()))))
            if action.kind in (BACKWARD, WEIGHT_GRADIENT):
                oldest[action.place] = min(version, needed[-1])
        kept, newest = 1, Counter[Place]()
        for action, version in zip(actions, reversed(needed), strict=True):
            if action.kind == UPDATE:
                newest[action.place] += 1
                kept = max(kept, 1 + newest[action.place] - version)
        most.append(kept)
    return most


def check_versions(schedule: Schedule, limit: int | None = None) -> None:
    """ValueError where updates do not take in every microbatch once and in order, or a version is not there in time.

    limit: of the versions that a rank keeps.
    """
    taken = _taken_in(schedule)
    updates = updates_of(schedule)
    last = dict.fromkeys(schedule.placement, -1)
    for rank, actions in enumerate(schedule.lists):
        made: Counter[Place] = Counter()
        for position, action in enumerate(actions):
            last[action.place] = max(last[action.place], action.microbatch)
            made[action.place] += action.kind == UPDATE
            needed = version_used(schedule, updates, action)
            if action.kind == FORWARD and needed > made[action.place]:
                raise fault(
                    schedule,
                    f"rank {rank}, position {position}: {action} needs version {needed} of the stage's weights, and "
                    f"{made[action.place]} updates come before it; put the update before it, or give the stage a delay",
                    (rank, position),
                )
    for place, number in last.items():
        if taken[place] < number:
            rank = schedule.placement[place]
            end = len(schedule.lists[rank])
            raise fault(
                schedule,
                f"rank {rank}, position {end} (the end of its list): no U of stage {place[1]} takes in the gradient of "
                f"microbatch {number}; end the list with an update",
                (rank, end),
            )
    kept = weight_versions(schedule)
    if limit is not None and max(kept) > limit:
        raise ValueError(
            f"rank {kept.index(max(kept))} keeps {max(kept)} versions of a stage's weights, and versions_limit is "
            f"{limit}; use a schedule with smaller delays"
        )


def _taken_in(schedule: Schedule) -> dict[Place, int]:
    """Up to which microbatch the updates of each stage take in gradients; ValueError where they cannot."""
    taken = dict.fromkeys(schedule.placement, -1)
    for rank, actions in enumerate(schedule.lists):
        for position, action in enumerate(actions):
            if action.kind != UPDATE:
                continue
            where = f"rank {rank}, position {position}: {action}"
            before = taken[action.place]
            if action.microbatch <= before:
                rule = f"an update before took in the gradients up to microbatch {before}; let updates ascend"
                raise fault(schedule, f"{where} has nothing to take in: {rule}", (rank, position))
            missing = _missing(schedule, actions[:position], action, before)
            if missing is not None:
                rule = f"the gradient of microbatch {missing} is not there; put the update behind it"
                raise fault(schedule, f"{where} comes too early: {rule}", (rank, position))
            taken[action.place] = action.microbatch
    return taken


def _missing(schedule: Schedule, before: Sequence[Action], update: Action, taken: int) -> int | None:
    """A microbatch of the update whose gradient is not complete before it, None where all are."""
    done = {a.microbatch for a in before if a.place == update.place and a.kind in (BACKWARD, WEIGHT_GRADIENT)}
    numbers = {a.microbatch for actions in schedule.lists for a in actions if a.path == update.path}
    return min((n for n in numbers if taken < n <= update.microbatch and n not in done), default=None)
