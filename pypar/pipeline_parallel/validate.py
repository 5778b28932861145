"""Checks that a schedule is complete, fits in memory and can run without deadlock."""

from __future__ import annotations

from collections.abc import Sequence

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    KINDS,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
    Message,
    Schedule,
    local_dependency,
)
from pypar.pipeline_parallel.stage_cost import Costs, held_after, per_stage

Positions = dict[Action, tuple[int, int]]  # {action: (rank, position in its list)}


def validate(
    schedule: Schedule,
    *,
    num_microbatches: int | None = None,
    forward_only: bool = False,
    costs: Costs = None,
    memory_limit: float | Sequence[float] | None = None,
) -> None:
    """Raises ValueError unless the schedule is valid, with rank and position (from 0) of the faulty action.

    Valid means: every path has the same stages, each on one rank; every microbatch goes along one path; each
    stage of that path runs F once for it, and either B once or I and W once each (neither when
    `forward_only`); each action comes after what it needs on its own rank; no rank holds more than
    `memory_limit`; and running the lists with messages that wait in a mailbox, as the runtime does, comes to
    the end.

    Args:
        num_microbatches: how many there must be; by default as many as the schedule names.
        costs: of the stages, as `simulate` takes them; for `memory_limit` only.
        memory_limit: of activations, for every rank or one for each, in the unit of `StageCost.activation`
            (by default the number of microbatches held at once).
    """
    if not any(schedule.lists):
        raise ValueError(
            "the pipeline schedule has no action; a schedule needs at least one rank and one microbatch"
        )
    count = schedule.num_microbatches if num_microbatches is None else num_microbatches
    _check_placement(schedule)
    positions = _positions(schedule, count)
    paths = _paths(positions)
    for path, stage in schedule.placement:
        for microbatch in range(count):
            if paths.get(microbatch, path) == path:
                _check_complete(schedule, positions, Action(FORWARD, stage, microbatch, path), forward_only)
    _check_order(schedule, positions)
    if memory_limit is not None:
        _check_memory(schedule, costs, memory_limit)
    _check_runs(schedule)


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
            if action.kind not in KINDS:
                raise ValueError(f"{where} has kind {action.kind!r}; a kind is one of {', '.join(KINDS)}")
            if min(action.path, action.stage) < 0 or not 0 <= action.microbatch < num_microbatches:
                raise ValueError(
                    f"{where} is out of range; stages and paths count from 0 and microbatches from 0 to "
                    f"{num_microbatches - 1}"
                )
            if action in positions:
                first_rank, first_position = positions[action]
                raise ValueError(
                    f"{where} already ran at rank {first_rank}, position {first_position}; remove one"
                )
            if schedule.placement.get(action.place) != rank:
                home = schedule.placement.get(action.place)
                lives = "no rank" if home is None else f"rank {home}"
                raise ValueError(
                    f"{where} is of a stage that lives on {lives}; a stage runs on the one rank that the "
                    f"placement gives it"
                )
            positions[action] = (rank, position)
    return positions


def _paths(positions: Positions) -> dict[int, int]:
    """{microbatch: path}, after checking that each goes along one."""
    paths: dict[int, int] = {}
    for action, (rank, position) in positions.items():
        path = paths.setdefault(action.microbatch, action.path)
        if path != action.path:
            raise ValueError(
                f"rank {rank}, position {position}: {action} is on path {action.path}, but microbatch "
                f"{action.microbatch} also goes along path {path}; give each microbatch one path"
            )
    return paths


def _check_complete(schedule: Schedule, positions: Positions, forward: Action, forward_only: bool) -> None:
    """Checks F, B, I, W and U of one stage and microbatch."""
    rank = schedule.placement[forward.place]
    kinds = {kind: positions[a] for kind in KINDS if (a := forward._replace(kind=kind)) in positions}
    who = forward.whose
    at_end = f"rank {rank}, position {len(schedule.lists[rank])} (the end of its list)"
    if FORWARD not in kinds:
        raise ValueError(f"{at_end}: F of {who} is missing; every stage runs F once for every microbatch")
    backward = [kind for kind in (BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT) if kind in kinds]
    if forward_only:
        for kind in (*backward, *(kind for kind in kinds if kind == UPDATE)):
            raise ValueError(
                f"rank {rank}, position {kinds[kind][1]}: {kind} of {who} in a forward-only schedule; remove "
                f"it"
            )
    if forward_only or backward in ([BACKWARD], [INPUT_GRADIENT, WEIGHT_GRADIENT]):
        return
    if not backward:
        raise ValueError(f"{at_end}: B of {who} is missing; every microbatch needs B, or I and W")
    if BACKWARD in backward:
        raise ValueError(
            f"rank {rank}, position {kinds[backward[1]][1]}: {backward[1]} of {who} comes beside its B; B "
            f"already is I and W, keep one form"
        )
    lacking = WEIGHT_GRADIENT if backward == [INPUT_GRADIENT] else INPUT_GRADIENT
    raise ValueError(f"{at_end}: {lacking} of {who} is missing; I and W together make the backward")


def _check_order(schedule: Schedule, positions: Positions) -> None:
    """Checks that each action comes after the one of its own stage and microbatch that it needs."""
    for action, (rank, position) in positions.items():
        for needed in local_dependency(action):
            if needed in positions and positions[needed][1] > position:
                raise ValueError(
                    f"rank {rank}, position {position}: {action} comes before {needed} at position "
                    f"{positions[needed][1]}; swap them"
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
        for position, held in enumerate(held_after(actions, stages)):
            if held > limits[rank]:
                raise ValueError(
                    f"rank {rank}, position {position}: {actions[position]} makes the activations held "
                    f"{held:g}, over the limit of {limits[rank]:g}; run a backward before it"
                )


def _check_runs(schedule: Schedule) -> None:
    """Runs the lists without time: a rank advances while what its next action needs has been sent."""
    sent: set[Message | None] = {None}
    positions = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.lists):
            while positions[rank] < len(actions):
                action = actions[positions[rank]]
                if schedule.needed_by(action) not in sent:
                    break
                sent.add(schedule.sent_by(action))
                positions[rank] += 1
                moved = True
    blocked = [
        f"rank {rank}, position {position}: {actions[position]} waits for "
        f"{_awaited(schedule, actions[position])}"
        for rank, (position, actions) in enumerate(zip(positions, schedule.lists, strict=True))
        if position < len(actions)
    ]
    if blocked:
        raise ValueError(
            f"the pipeline schedule deadlocks: {'; '.join(blocked)}; run what is waited for before what "
            f"waits for it"
        )


def _awaited(schedule: Schedule, action: Action) -> str:
    message = schedule.needed_by(action)
    assert message is not None
    return f"the {message.kind} of microbatch {message.microbatch} from stage {message.sender[1]}"
