"""Checks that a schedule is complete and can run without deadlock."""

from __future__ import annotations

from collections import Counter

from pypar.pipeline_parallel.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    KINDS,
    WEIGHT_GRADIENT,
    Action,
    Message,
    Schedule,
    local_dependency,
    needed_by,
    num_microbatches_of,
    sent_by,
    stage_ranks,
)


def validate(schedule: Schedule, *, num_microbatches: int | None = None, forward_only: bool = False) -> None:
    """Raises ValueError unless the schedule is valid, with rank and position (from 0) of the faulty action.

    Valid means: every stage lives on one rank; each stage runs F once for every microbatch, and either B
    once or I and W once each (neither when `forward_only`); each action comes after what it needs on its own
    rank; and running the lists with messages that wait in a mailbox, as the runtime does, comes to the end.

    Args:
        num_microbatches: how many there must be; by default as many as the schedule names.
    """
    if not schedule or not any(schedule):
        raise ValueError(
            "the pipeline schedule has no action; a schedule needs at least one rank and one microbatch"
        )
    count = num_microbatches_of(schedule) if num_microbatches is None else num_microbatches
    places = _places(schedule, count)
    stages = stage_ranks(schedule)
    missing = sorted(set(range(max(stages) + 1)) - set(stages))
    if missing:
        raise ValueError(
            f"no rank runs stage {missing[0]} although stage {max(stages)} exists; number the stages from "
            f"0 without a gap"
        )
    for stage, rank in stages.items():
        for microbatch in range(count):
            _check_complete(
                places, rank, len(schedule[rank]), Action(FORWARD, stage, microbatch), forward_only
            )
    _check_order(schedule, places)
    _check_runs(schedule, len(stages))


def _places(schedule: Schedule, num_microbatches: int) -> dict[Action, tuple[int, int]]:
    """{action: (rank, position)}, after checking each action by itself and that none is there twice."""
    places: dict[Action, tuple[int, int]] = {}
    stages = stage_ranks(schedule)
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            where = f"rank {rank}, position {position}: {action}"
            if action.kind not in KINDS:
                raise ValueError(f"{where} has kind {action.kind!r}; a kind is one of {', '.join(KINDS)}")
            if action.stage < 0 or not 0 <= action.microbatch < num_microbatches:
                raise ValueError(
                    f"{where} is out of range; stages count from 0 and microbatches from 0 to "
                    f"{num_microbatches - 1}"
                )
            if action in places:
                raise ValueError(
                    f"{where} already ran at rank {places[action][0]}, position {places[action][1]}; "
                    f"remove one"
                )
            if stages[action.stage] != rank:
                raise ValueError(
                    f"{where} is of a stage that lives on rank {stages[action.stage]}; a stage runs on one "
                    f"rank only"
                )
            places[action] = (rank, position)
    return places


def _check_complete(
    places: dict[Action, tuple[int, int]], rank: int, length: int, forward: Action, forward_only: bool
) -> None:
    """Checks F, B, I and W of one stage and microbatch."""
    kinds = Counter(kind for kind in KINDS if forward._replace(kind=kind) in places)
    who = f"stage {forward.stage}, microbatch {forward.microbatch}"
    at_end = f"rank {rank}, position {length} (the end of its list)"
    if not kinds[FORWARD]:
        raise ValueError(f"{at_end}: F of {who} is missing; every stage runs F once for every microbatch")
    backward = [kind for kind in (BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT) if kinds[kind]]
    if forward_only and backward:
        position = places[forward._replace(kind=backward[0])][1]
        raise ValueError(
            f"rank {rank}, position {position}: {backward[0]} of {who} in a forward-only schedule; remove it"
        )
    if forward_only or backward in ([BACKWARD], [INPUT_GRADIENT, WEIGHT_GRADIENT]):
        return
    if not backward:
        raise ValueError(f"{at_end}: B of {who} is missing; every microbatch needs B, or I and W")
    if BACKWARD in backward:
        position = places[forward._replace(kind=backward[1])][1]
        raise ValueError(
            f"rank {rank}, position {position}: {backward[1]} of {who} comes beside its B; B already is I "
            f"and W, keep one form"
        )
    lacking = WEIGHT_GRADIENT if backward == [INPUT_GRADIENT] else INPUT_GRADIENT
    raise ValueError(f"{at_end}: {lacking} of {who} is missing; I and W together make the backward")


def _check_order(schedule: Schedule, places: dict[Action, tuple[int, int]]) -> None:
    """Checks that each action comes after the one of its own stage and microbatch that it needs."""
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            needed = local_dependency(action)
            if needed is not None and places[needed][1] > position:
                raise ValueError(
                    f"rank {rank}, position {position}: {action} comes before {needed} at position "
                    f"{places[needed][1]};"
                    " swap them"
                )


def _check_runs(schedule: Schedule, num_stages: int) -> None:
    """Runs the lists without time: a rank advances while what its next action needs has been sent."""
    sent: set[Message] = set()
    positions = [0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while positions[rank] < len(actions):
                action = actions[positions[rank]]
                needed = needed_by(action, num_stages)
                if needed is not None and needed not in sent:
                    break
                made = sent_by(action, num_stages)
                if made is not None:
                    sent.add(made)
                positions[rank] += 1
                moved = True
    blocked = [
        f"rank {rank}, position {position}: {actions[position]} waits for "
        f"{_awaited(actions[position], num_stages)}"
        for rank, (position, actions) in enumerate(zip(positions, schedule, strict=True))
        if position < len(actions)
    ]
    if blocked:
        raise ValueError(
            f"the pipeline schedule deadlocks: {'; '.join(blocked)}; run what is waited for before what "
            f"waits for it"
        )


def _awaited(action: Action, num_stages: int) -> str:
    message = needed_by(action, num_stages)
    assert message is not None
    return f"the {message.kind} of microbatch {message.microbatch} from stage {message.sender}"
