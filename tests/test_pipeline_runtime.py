"""The pipeline runtime in real processes: the gradients of one process, overlap, memory that is freed."""

import contextlib
import random

import pytest
import torch
from torch import nn

from pypar.comm import point_to_point
from pypar.mesh import Axis
from pypar.pipeline_parallel import PipelineRuntime, catalog, mailbox, schedules
from pypar.pipeline_parallel.action import Action, local_dependency, needed_by, sent_by

WIDTH, ROWS = 6, 3


class Stage(nn.Module):
    """Two layers; the last stage turns its output into a loss."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(100 + stage)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.is_last = stage == num_stages - 1

    def forward(self, hidden, microbatch):
        x = microbatch if hidden is None else hidden
        x = x + self.second(torch.tanh(self.first(x)))
        return x.square().mean() if self.is_last else x


def _microbatches(number):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(number)]


def _reference(num_stages, num_microbatches, order):
    """Losses and gradients of the whole model in one process; the backwards run in `order`."""
    stages = [Stage(stage, num_stages) for stage in range(num_stages)]
    losses = []
    for microbatch in _microbatches(num_microbatches):
        hidden = None
        for stage in stages:
            hidden = stage(hidden, microbatch)
        losses.append(hidden)
    for index in order:
        losses[index].backward()
    return [loss.item() for loss in losses], [[p.grad for p in stage.parameters()] for stage in stages]


def _world_axis():
    if not torch.distributed.is_initialized():
        return Axis.single("pp")
    return Axis.of(torch.distributed.group.WORLD, "pp")


def _runtime(schedule, num_stages, axis):
    own = sorted({action.stage for action in schedule[axis.rank]})
    stages = {stage: Stage(stage, num_stages) for stage in own}
    module = stages if len(own) > 1 else stages[own[0]]
    runtime = PipelineRuntime(
        module,
        axis,
        schedule,
        activation_shape=(ROWS, WIDTH),
        activation_dtype=torch.float32,
        device="cpu",
    )
    return runtime, stages


def _train(schedule, num_stages, num_microbatches):
    """Runs one evaluation and two steps; returns everything that a test wants to compare."""
    axis = _world_axis()
    runtime, stages = _runtime(schedule, num_stages, axis)
    evaluated = runtime.evaluate(_microbatches(num_microbatches + 1))
    assert all(p.grad is None for stage in stages.values() for p in stage.parameters())
    first = runtime.step(_microbatches(num_microbatches))
    gradients = {s: [p.grad.clone() for p in stage.parameters()] for s, stage in stages.items()}
    runtime.step(_microbatches(num_microbatches))
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


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_are_bitwise_those_of_one_process(ranks, name, num_microbatches, world_size):
    schedule = catalog.build(name, world_size, num_microbatches)
    if world_size == 1:
        results = [_train(schedule, 1, num_microbatches)]
    else:
        results = ranks(world_size, _train, schedule, world_size, num_microbatches)
    _check(results, world_size, num_microbatches)
    peaks = [
        num_microbatches if name == "gpipe" else min(num_microbatches, world_size - rank)
        for rank in range(world_size)
    ]
    assert [result["peak"] for result in results] == peaks
    tensors = 2 * num_microbatches + num_microbatches + 1  # activations of two steps and one evaluation
    for rank, result in enumerate(results):
        down = tensors if rank < world_size - 1 else 0
        up = 2 * num_microbatches if rank > 0 else 0
        assert result["bytes"] == (down + up) * ROWS * WIDTH * 4


def _interleaved(owners, num_microbatches, seed):
    """A valid schedule in random order, stage s on rank owners[s]; a stage's backwards run in order."""
    pick = random.Random(seed)
    num_stages = len(owners)
    waiting = [Action(k, s, m) for m in range(num_microbatches) for s in range(num_stages) for k in "FB"]
    schedule = [[] for _ in range(max(owners) + 1)]
    done, sent = {None}, {None}
    while waiting:
        ready = [a for a in waiting if needed_by(a, num_stages) in sent and local_dependency(a) in done]
        ready = [
            a
            for a in ready
            if a.kind == "F" or a.microbatch == min(b.microbatch for b in waiting if b[:2] == a[:2])
        ]
        action = pick.choice(ready)
        waiting.remove(action)
        done.add(action)
        sent.add(sent_by(action, num_stages))
        schedule[owners[action.stage]].append(action)
    return schedule


@pytest.mark.parametrize("owners", [[0, 1, 0, 1], [0, 1, 1, 0], [1, 0], [0, 0, 1]])
def test_random_valid_schedules_with_several_stages_a_rank(ranks, owners):
    for seed in range(4):
        _check(ranks(2, _train, _interleaved(owners, 3, seed), len(owners), 3), len(owners), 3)


def test_random_valid_schedule_in_one_process():
    schedule = _interleaved([0, 0, 0], 3, 1)
    _check([_train(schedule, 3, 3)], 3, 3)


def test_random_valid_schedules_on_four_ranks(ranks):
    owners = [2, 0, 3, 1, 1, 3, 0, 2]
    for seed in range(2):
        _check(ranks(4, _train, _interleaved(owners, 4, seed), len(owners), 4), len(owners), 4)


class _Recorder:
    """Gradient buckets that note which backward runs inside `accumulate`."""

    def __init__(self):
        self.inside = False
        self.seen = []

    @contextlib.contextmanager
    def accumulate(self):
        self.inside = True
        yield
        self.inside = False


def _last_backward(name):
    axis = _world_axis()
    runtime, stages = _runtime(catalog.build(name, axis.size, 3), axis.size, axis)
    recorder = _Recorder()
    weight = stages[axis.rank].first.weight
    weight.register_post_accumulate_grad_hook(lambda _: recorder.seen.append(recorder.inside))
    runtime.step(_microbatches(3), on_last_backward=recorder)
    return recorder.seen


@pytest.mark.parametrize("name", catalog.names())
def test_only_the_last_backward_reduces(ranks, name):
    assert ranks(2, _last_backward, name) == [[True, True, False]] * 2


def _record_order():
    """The order of posts, sends, waits and computations of the first rank of a 1F1B step."""
    axis = _world_axis()
    runtime, stages = _runtime(schedules.one_f_one_b(2, 3), 2, axis)
    events = []

    def noting(word, function):
        def noted(*args, **kwargs):
            events.append(word)
            return function(*args, **kwargs)

        return noted

    mailbox.send_start = noting("send", point_to_point.send_start)
    mailbox.receive_start = noting("post", point_to_point.receive_start)
    take = mailbox.Mailbox.take
    mailbox.Mailbox.take = noting("take", take)
    finish = mailbox.Mailbox.finish
    mailbox.Mailbox.finish = noting("finish", finish)
    stage = stages[axis.rank]
    stage.register_forward_hook(lambda *_: events.append("forward"))
    stage.first.weight.register_post_accumulate_grad_hook(lambda _: events.append("weight gradient"))
    try:
        runtime.step(_microbatches(3))
    finally:
        mailbox.send_start, mailbox.receive_start = point_to_point.send_start, point_to_point.receive_start
        mailbox.Mailbox.take, mailbox.Mailbox.finish = take, finish
    return events


def test_receives_are_posted_before_the_computation_before_and_sends_are_not_waited_for(ranks):
    first, second = ranks(2, _record_order)
    # Rank 0: F0 F1 B0 F2 B1 B2. The gradient of microbatch i+1 is posted before backward i starts.
    assert first[:4] == ["post", "forward", "send", "forward"]
    assert first[4:8] == ["send", "post", "take", "weight gradient"]
    assert first[-1] == "finish" and "finish" not in first[:-1]
    # Rank 1: F0 B0 F1 B1 F2 B2. The next activation is posted before F; gradients leave inside backward.
    assert second[:4] == ["post", "post", "take", "forward"]
    assert second.index("send") < len(second) - 1 and second.count("send") == 3


def _bytes_held(num_microbatches, name):
    """The most bytes that the graph of this rank held at once: tensors that autograd saved and did not free."""
    axis = _world_axis()
    runtime, _ = _runtime(catalog.build(name, axis.size, num_microbatches), axis.size, axis)
    held, most = [0], [0]

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            held[0] += tensor.nbytes
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        runtime.step(_microbatches(num_microbatches))
    return most[0], held[0]


@pytest.mark.parametrize("name", catalog.names())
def test_activations_are_freed_as_soon_as_their_backward_is_done(ranks, name):
    one = ranks(4, _bytes_held, 1, name)
    held = ranks(4, _bytes_held, 8, name)
    for rank in range(4):
        expected = 8 if name == "gpipe" else 4 - rank
        assert held[rank] == (expected * one[rank][0], 0)


def _wrong_shape():
    axis = _world_axis()
    runtime, stages = _runtime(schedules.gpipe(2, 1), 2, axis)
    if axis.rank == 1:
        return None  # rank 0 refuses before anything is sent
    stages[0].second = nn.Linear(WIDTH, WIDTH + 1)
    stages[0].forward = lambda hidden, microbatch: stages[0].second(microbatch)
    with pytest.raises(
        ValueError, match=r"stage 0 made a activation|shape \(3, 7\).*activation_shape=\(3, 6\)"
    ):
        runtime.step(_microbatches(1))
    return True


def test_a_stage_that_makes_another_shape_than_announced_is_refused(ranks):
    assert ranks(2, _wrong_shape) == [True, None]


def _single(module, schedule):
    return PipelineRuntime(
        module,
        Axis.single("pp"),
        schedule,
        activation_shape=(ROWS, WIDTH),
        activation_dtype=torch.float32,
        device="cpu",
    )


def test_refusals():
    with pytest.raises(ValueError, match="the schedule has 2 ranks but axis 'pp' has 1"):
        _single(Stage(0, 1), schedules.gpipe(2, 1))
    with pytest.raises(ValueError, match="stages \\[0, 1\\] but module is a single one"):
        _single(Stage(0, 1), _interleaved([0, 0], 1, 0))
    with pytest.raises(
        ValueError, match="module has stages \\[0\\] but the schedule gives rank 0 \\[0, 1\\]"
    ):
        _single({0: Stage(0, 1)}, _interleaved([0, 0], 1, 0))
    with pytest.raises(ValueError, match="rank 0, position 1: I.* split backward"):
        _single(Stage(0, 1), [[Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)]])
    with pytest.raises(ValueError, match="step got 3 microbatches but the schedule has 2"):
        _single(Stage(0, 1), schedules.gpipe(1, 2)).step(_microbatches(3))
    with pytest.raises(ValueError, match="returned shape \\(3, 6\\) instead of a loss"):
        _single(Stage(0, 2), schedules.gpipe(1, 1)).step(_microbatches(1))
    with pytest.raises(ValueError, match="does not depend on the input of stage 1"):
        deaf = {0: Stage(0, 2), 1: lambda hidden, microbatch: Stage(0, 1)(None, microbatch)}
        _single(deaf, _interleaved([0, 0], 1, 0)).step(_microbatches(1))


def test_a_frozen_first_stage_needs_no_backward():
    stages = {0: Stage(0, 2).requires_grad_(False), 1: Stage(1, 2)}
    _single(stages, _interleaved([0, 0], 2, 0)).step(_microbatches(2))
    _, gradients = _reference(2, 2, [0, 1])
    assert all(torch.equal(p.grad, g) for p, g in zip(stages[1].parameters(), gradients[1], strict=True))
