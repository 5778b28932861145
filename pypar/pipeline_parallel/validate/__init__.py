"""Checks that a schedule is complete, fits in memory and can run without deadlock."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    KINDS,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
    Schedule,
)
from pypar.pipeline_parallel.stage_cost import Costs, held_during, per_stage
from pypar.pipeline_parallel.validate.deadlock import check_runs
from pypar.pipeline_parallel.validate.fault import fault
from pypar.pipeline_parallel.validate.versions import check_versions

Positions = dict[Action, tuple[int, int]]  # {action: (rank, position in its list)}


def validate(
    schedule: Schedule,
    *,
    num_microbatches: int | None = None,
    forward_only: bool = False,
    costs: Costs = None,
    memory_limit: float | Sequence[float] | None = None,
    buffers: int | None = None,
    versions_limit: int | None = None,
) -> None:
    """Raises ValueError unless the schedule is valid, with rank, position (from 0) and action of the fault, and beneath
    them the list around it with an arrow.

    Valid means: every path has the same stages, each on one rank; every microbatch goes along one path; each
    stage of that path runs F once for it, and either B once or I and W once each (neither when
    `forward_only`); each action comes after what it needs on its own rank; no rank holds more than
    `memory_limit`; and running the lists with messages that wait in a mailbox, as the runtime does, comes to
    the end. In a schedule with updates each stage takes in every microbatch by one of them, in order, and the version
    of its weights that a microbatch needs (`versions`) is made before it begins. A pair is a forward and a backward of
    two microbatches.

    Args:
        num_microbatches: how many there must be; by default as many as the schedule names.
        costs: of the stages, as `simulate` takes them; for `memory_limit` only.
        memory_limit: of activations, for every rank or one for each, in the unit of `StageCost.activation`
            (by default the number of microbatches held at once).
        buffers: how many messages may wait at the receiving end of an edge before its sender waits; 0 where a sender
            waits until the receive is posted; by default any number, as the runtime sends without waiting.
        versions_limit: of the versions of a stage's weights that a rank keeps.
    """
    if not any(schedule.lists):
        raise ValueError(
            "the pipeline schedule has no action; a schedule needs at least one rank and one microbatch"
        )
    total = schedule.num_microbatches
    if schedule.num_segments < 1 or total % schedule.num_segments:
        raise ValueError(
            f"the schedule's num_segments ({schedule.num_segments}) must be at least 1 and divide the {total} numbers "
            "that its actions name: each microbatch is cut into so many"
        )
    count = total if num_microbatches is None else num_microbatches * schedule.num_segments
    _check_placement(schedule)
    positions = _positions(schedule, count)
    paths = _paths(schedule, positions)
    for path, stage in schedule.placement:
        for microbatch in range(count):
            if paths.get(microbatch, path) == path:
                _check_complete(schedule, positions, Action(FORWARD, stage, microbatch, path), forward_only)
    _check_order(schedule, positions)
    _check_pairs(schedule)
    if any(action.kind == UPDATE for action in positions):
        check_versions(schedule, versions_limit)
    if memory_limit is not None:
        _check_memory(schedule, costs, memory_limit)
    check_runs(schedule, buffers)


def _check_placement(schedule: Schedule) -> None:
    for (path, stage), rank in schedule.placement.items():
        of_path = f" of path {path}" if schedule.num_paths > 1 else ""
        if min(path, stage) < 0 or not 0 <= rank < schedule.num_ranks:
            raise ValueError(
                f"the placement puts stage {stage}{of_path} on rank {rank}; paths and stages count from 0, "
                f"and ranks from 0 to {schedule.num_ranks - 1}"
            )
    for path in range(schedule.num_paths):
        of_path = f" of path {path}" if schedule.num_paths > 1 else ""
        for stage in range(schedule.num_stages):
            if (path, stage) not in schedule.placement:
                raise ValueError(
                    f"no rank runs stage {stage}{of_path} although stage {schedule.num_stages - 1} exists; "
                    f"number the stages of every path from 0 without a gap"
                )


def _positions(schedule: Schedule, num_microbatches: int) -> Positions:
    """Where each action is, after checking each by itself and that none is there twice."""
    positions: Positions = {}
    for rank, actions in enumerate(schedule.lists):
        for position, action in enumerate(actions):
            where = f"rank {rank}, position {position}: {action}"
            here = rank, position
            if action.kind not in KINDS:
                rule = f"a kind is one of {', '.join(KINDS)}"
                raise fault(schedule, f"{where} has kind {action.kind!r}; {rule}", here)
            if min(action.path, action.stage) < 0 or not 0 <= action.microbatch < num_microbatches:
                rule = f"stages and paths count from 0 and microbatches from 0 to {num_microbatches - 1}"
                raise fault(schedule, f"{where} is out of range; {rule}", here)
            if action in positions:
                first = "rank {}, position {}".format(*positions[action])
                raise fault(schedule, f"{where} already ran at {first}; remove one", positions[action], here)
            if schedule.placement.get(action.place) != rank:
                home = schedule.placement.get(action.place)
                lives = "no rank" if home is None else f"rank {home}"
                rule = "a stage runs on the one rank that the placement gives it"
                raise fault(schedule, f"{where} is of a stage that lives on {lives}; {rule}", here)
            positions[action] = here
    return positions


def _paths(schedule: Schedule, positions: Positions) -> dict[int, int]:
    """{microbatch: path}, after checking that each goes along one."""
    paths: dict[int, int] = {}
    for action, (rank, position) in positions.items():
        path = paths.setdefault(action.microbatch, action.path)
        if path != action.path:
            raise fault(
                schedule,
                f"rank {rank}, position {position}: {action} is on path {action.path}, but microbatch "
                f"{action.microbatch} also goes along path {path}; give each microbatch one path",
                (rank, position),
            )
    return paths


def _check_complete(schedule: Schedule, positions: Positions, forward: Action, forward_only: bool) -> None:
    """Checks F, B, I, W and U of one stage and microbatch."""
    rank = schedule.placement[forward.place]
    kinds = {kind: positions[a] for kind in KINDS if (a := forward._replace(kind=kind)) in positions}
    who = forward.whose
    end = len(schedule.lists[rank])

    def missing(kind: str, rule: str) -> ValueError:
        where = f"rank {rank}, position {end} (the end of its list)"
        return fault(schedule, f"{where}: {kind} of {who} is missing; {rule}", (rank, end))

    def needless(kind: str, rule: str) -> ValueError:
        position = kinds[kind][1]
        return fault(schedule, f"rank {rank}, position {position}: {kind} of {who} {rule}", (rank, position))

    if FORWARD not in kinds:
        raise missing(FORWARD, "every stage runs F once for every microbatch")
    backward = [kind for kind in (BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT) if kind in kinds]
    if forward_only:
        for kind in (*backward, *(kind for kind in kinds if kind == UPDATE)):
            raise needless(kind, "in a forward-only schedule; remove it")
    if forward_only or backward in ([BACKWARD], [INPUT_GRADIENT, WEIGHT_GRADIENT]):
        return
    if not backward:
        raise missing(BACKWARD, "every microbatch needs B, or I and W")
    if BACKWARD in backward:
        raise needless(backward[1], "comes beside its B; B already is I and W, keep one form")
    lacking = WEIGHT_GRADIENT if backward == [INPUT_GRADIENT] else INPUT_GRADIENT
    raise missing(lacking, "I and W together make the backward")


def _check_order(schedule: Schedule, positions: Positions) -> None:
    """Checks that each action comes after those of its own stage that it needs."""
    for action, (rank, position) in positions.items():
        for needed in itertools.chain.from_iterable(schedule.local_dependencies(action)):
            if needed in positions and positions[needed][1] > position:
                raise fault(
                    schedule,
                    f"rank {rank}, position {position}: {action} comes before {needed} at position "
                    f"{positions[needed][1]}; swap them",
                    (rank, position),
                )


def _check_pairs(schedule: Schedule) -> None:
    for rank, position in sorted(schedule.pairs):
        actions = schedule.lists[rank][position : position + 2] if rank < schedule.num_ranks else ()
        kinds = [action.kind for action in actions]
        alone = (rank, position + 1) not in schedule.pairs
        if kinds != [FORWARD, BACKWARD] or not alone or actions[0].microbatch == actions[1].microbatch:
            names = " and ".join(map(str, actions)) or "nothing"
            raise fault(
                schedule,
                f"rank {rank}, position {position}: {names} cannot run as one; a pair is an F and behind it a B of "
                "another microbatch, and in no other pair",
                *[(rank, position)] * (rank < schedule.num_ranks),
            )


def _check_memory(schedule: Schedule, costs: Costs, memory_limit: float | Sequence[float]) -> None:
    limits = [memory_limit] * schedule.num_ranks if isinstance(memory_limit, (int, float)) else memory_limit
    if len(limits) != schedule.num_ranks:
        raise ValueError(
            f"memory_limit has {len(limits)} entries but the schedule has {schedule.num_ranks} ranks; pass "
            f"one number, or one a rank"
        )
    stages = per_stage(costs, schedule.num_stages)
    for rank, actions in enumerate(schedule.lists):
        for position, held in enumerate(held_during(actions, stages)):
            if held > limits[rank]:
                raise fault(
                    schedule,
                    f"rank {rank}, position {position}: {actions[position]} makes the activations held "
                    f"{held:g}, over the limit of {limits[rank]:g}; run a backward before it",
                    (rank, position),
                )
