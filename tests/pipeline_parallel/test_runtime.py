"""The pipeline runtime in real processes: losses and gradients of one process, bytes, refusals."""

import pytest
import torch

from pypar.pipeline_parallel import PipelineRuntime, schedules, simulate
from pypar.pipeline_parallel.action import Action, Schedule
from pypar.pipeline_parallel.forward_only import forwards_of
from pypar.pipeline_parallel.messages.header import HEADER_BYTES
from pypar.pipeline_parallel.trained import check_runs_here, check_trains
from tests.pipeline_parallel.stage import (
    BIDIRECTIONAL,
    INTERLEAVED,
    ROWS,
    RUNNING,
    WIDTH,
    Stage,
    microbatches,
    random_schedule,
    single_runtime,
    stage_runtime,
    world_axis,
)


def _reference(num_stages, num_microbatches, order):
    """Losses and gradients of the whole model in one process; the backwards run in `order`."""
    stages = [Stage(stage, num_stages) for stage in range(num_stages)]
    losses = []
    for microbatch in microbatches(num_microbatches):
        hidden = None
        for stage in stages:
            hidden = stage(hidden, microbatch)
        losses.append(hidden)
    for index in order:
        losses[index].backward()
    return [loss.item() for loss in losses], [[p.grad for p in stage.parameters()] for stage in stages]


def _train(schedule, num_stages, num_microbatches):
    """Runs one evaluation and two steps; returns everything that a test wants to compare."""
    axis = world_axis()
    runtime, stages = stage_runtime(schedule, num_stages, axis)
    evaluated = runtime.evaluate(microbatches(num_microbatches + 1))
    assert all(p.grad is None for stage in stages.values() for p in stage.parameters())
    first = runtime.step(microbatches(num_microbatches))
    gradients = {s: [p.grad.clone() for p in stage.parameters()] for s, stage in stages.items()}
    runtime.step(microbatches(num_microbatches))
    for s, stage in stages.items():
        for once, p in zip(gradients[s], stage.parameters(), strict=True):
            torch.testing.assert_close(p.grad, 2 * once)
    return {
        "losses": [loss.item() for loss in first],
        "evaluated": [loss.item() for loss in evaluated],
        "gradients": gradients,
        "peak": runtime.peak_in_flight,
        "bytes": axis.traffic.bytes_sent,
        "requires_grad": any(loss.requires_grad for loss in first),
    }


def _check(results, num_stages, num_microbatches):
    losses, gradients = _reference(num_stages, num_microbatches, range(num_microbatches))
    evaluated, _ = _reference(num_stages, num_microbatches + 1, [])
    last = max(range(len(results)), key=lambda rank: max(results[rank]["gradients"]))
    for rank, result in enumerate(results):
        assert result["losses"] == (losses if rank == last else [])
        assert result["evaluated"] == (evaluated if rank == last else [])
        assert not result["requires_grad"]
        for stage, own in result["gradients"].items():
            for mine, theirs in zip(own, gradients[stage], strict=True):
                assert torch.equal(mine, theirs)
    assert sorted(s for result in results for s in result["gradients"]) == list(range(num_stages))


def _sizes(name):
    """(ranks, microbatches): with one process, two and four, and microbatches of R-1 ... 3R+1 of them."""
    for world_size, num_microbatches in (
        (1, 2),
        (2, 1),
        (2, 2),
        (2, 5),
        (4, 1),
        (4, 3),
        (4, 4),
        (4, 8),
        (4, 13),
    ):
        is_quick = name in ("gpipe", "one_f_one_b") and world_size * num_microbatches < 30
        is_quick |= (world_size, num_microbatches) in ((1, 2), (2, 5), (4, 3))
        yield pytest.param(name, world_size, num_microbatches, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "world_size", "num_microbatches"), [size for name in RUNNING for size in _sizes(name)]
)
def test_gradients_are_bitwise_those_of_one_process(ranks, name, num_microbatches, world_size):
    schedule = schedules.build(name, world_size, num_microbatches)
    num_stages = schedule.num_stages
    if world_size == 1:
        results = [_train(schedule, num_stages, num_microbatches)]
    else:
        results = ranks(world_size, _train, schedule, num_stages, num_microbatches)
    _check(results, num_stages, num_microbatches)
    assert [result["peak"] for result in results] == simulate(schedule).peak_in_flight
    evaluation = forwards_of(schedule, num_microbatches + 1)
    for rank, result in enumerate(results):
        sent = 2 * _num_sent(schedule, rank) + _num_sent(evaluation, rank)  # two steps and one evaluation
        assert result["bytes"] == sent * (HEADER_BYTES + ROWS * WIDTH * 4)


def _num_sent(schedule, rank):
    """How many messages a rank sends to others in one run."""
    messages = [schedule.sent_by(action) for action in schedule.lists[rank]]
    return sum(message is not None and schedule.placement[message.receiver] != rank for message in messages)


@pytest.mark.parametrize("name", [name for name in schedules.names() if name not in RUNNING])
def test_what_the_runtime_cannot_run_is_refused_by_a_sentence(name):
    """The runtime refuses updates and segments; two copies of a stage run, but a run refuses to train them."""
    schedule = schedules.build(name, 2, 4)
    with pytest.raises(ValueError, match=f"pipeline schedule {name} .*; use a schedule"):
        check_trains(name, schedule)
    if schedule.num_paths == 1:
        with pytest.raises(ValueError, match="is an update of weights|keys and values from one segment"):
            single_runtime(Stage(0, 1), schedules.build(name, 1, 4))


def test_a_split_backward_needs_a_newer_torch():
    check_runs_here(schedules.build("gpipe", 2, 2), "2.6.0")
    check_runs_here(schedules.build("zb_h1", 2, 2), "2.10.0+cpu")
    with pytest.raises(
        ValueError, match=r"position 1: I.* is a split backward, which needs torch 2.7 .* 2.6.0"
    ):
        check_runs_here(schedules.build("zb_h1", 1, 2), "2.6.0")


@pytest.mark.parametrize("owners", [[0, 1, 0, 1], [0, 1, 1, 0], [1, 0], [0, 0, 1]])
def test_random_valid_schedules_with_several_stages_a_rank(ranks, owners):
    for seed in range(4):
        _check(ranks(2, _train, random_schedule(owners, 3, seed), len(owners), 3), len(owners), 3)


@pytest.mark.parametrize("splits", [False, True])
def test_random_valid_schedule_in_one_process(splits):
    for seed in range(4):
        schedule = random_schedule([0, 0, 0], 3, seed, splits)
        _check([_train(schedule, 3, 3)], 3, 3)


@pytest.mark.parametrize("owners", [[0, 1], [0, 1, 0, 1], [0, 1, 1, 0]])
def test_random_valid_schedules_with_split_backward(ranks, owners):
    for seed in range(4):
        schedule = random_schedule(owners, 3, seed, splits=True)
        _check(ranks(2, _train, schedule, len(owners), 3), len(owners), 3)


def test_interleaved_stages(ranks):
    _check(ranks(2, _train, INTERLEAVED, 4, 2), 4, 2)


def _both_paths():
    """The losses of this rank and the gradients of its two stages."""
    axis = world_axis()
    stages = {place: Stage(place[1], 2) for place in BIDIRECTIONAL.stages_of(axis.rank)}
    runtime = PipelineRuntime(stages, axis, BIDIRECTIONAL)
    losses = [loss.item() for loss in runtime.step(microbatches(2))]
    gradients = {place: [p.grad for p in stage.parameters()] for place, stage in stages.items()}
    return losses, gradients, [loss.item() for loss in runtime.evaluate(microbatches(3))]


def test_two_paths_in_opposite_directions(ranks):
    (first, on_first, _), (second, on_second, evaluated) = ranks(2, _both_paths)
    losses, gradients = _reference(2, 2, range(2))
    assert [second, first] == [[losses[0]], [losses[1]]]  # path 0 ends on rank 1, path 1 on rank 0
    assert evaluated == _reference(2, 3, [])[0]
    copies = {**on_first, **on_second}
    for stage in range(2):
        for one, other, whole in zip(copies[0, stage], copies[1, stage], gradients[stage], strict=True):
            assert torch.equal(one + other, whole)


def test_random_valid_schedules_on_four_ranks(ranks):
    owners = [2, 0, 3, 1, 1, 3, 0, 2]
    for seed in range(2):
        _check(ranks(4, _train, random_schedule(owners, 4, seed), len(owners), 4), len(owners), 4)


def test_refusals():
    with pytest.raises(ValueError, match="the schedule has 2 ranks but axis 'pp' has 1"):
        single_runtime(Stage(0, 1), schedules.build("gpipe", 2, 1))
    with pytest.raises(ValueError, match="stages \\[0, 1\\] but stages is a single one"):
        single_runtime(Stage(0, 1), random_schedule([0, 0], 1, 0))
    with pytest.raises(ValueError, match="stages has \\[0\\] but the schedule gives rank 0 \\[0, 1\\]"):
        single_runtime({0: Stage(0, 1)}, random_schedule([0, 0], 1, 0))
    with pytest.raises(ValueError, match="rank 0, position 2: U.* is an update of weights"):
        single_runtime(Stage(0, 1), Schedule.of([[Action(kind, 0, 0) for kind in "FBU"]]))
    with pytest.raises(ValueError, match="step got 3 microbatches but the schedule has 2"):
        single_runtime(Stage(0, 1), schedules.build("gpipe", 1, 2)).step(microbatches(3))
    with pytest.raises(ValueError, match="returned shape \\(3, 6\\) instead of a loss"):
        single_runtime(Stage(0, 2), schedules.build("gpipe", 1, 1)).step(microbatches(1))
    with pytest.raises(ValueError, match="does not depend on the input of stage 1"):
        deaf = {0: Stage(0, 2), 1: lambda hidden, microbatch: Stage(0, 1)(None, microbatch)}
        single_runtime(deaf, random_schedule([0, 0], 1, 0)).step(microbatches(1))


def test_a_frozen_first_stage_needs_no_backward():
    stages = {0: Stage(0, 2).requires_grad_(False), 1: Stage(1, 2)}
    single_runtime(stages, random_schedule([0, 0], 2, 0)).step(microbatches(2))
    _, gradients = _reference(2, 2, [0, 1])
    assert all(torch.equal(p.grad, g) for p, g in zip(stages[1].parameters(), gradients[1], strict=True))
