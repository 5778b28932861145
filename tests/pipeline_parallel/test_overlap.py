"""What the pipeline runtime overlaps and frees: posted receives, the last backward, activations."""

import contextlib
import gc
import weakref
from functools import partial

import pytest
import torch

from pypar.comm import point_to_point
from pypar.pipeline_parallel import schedules, simulate
from pypar.pipeline_parallel.action import BACKWARD
from pypar.pipeline_parallel.messages import mailbox
from tests.harness.events import note
from tests.pipeline_parallel.stage import (
    ONE_STAGE,
    microbatches,
    single_runtime,
    stage_runtime,
    world_axis,
    written,
)

# Torch's hooks on saved tensors do not see the end of a graph whose backward was in two parts.
WHOLE_BACKWARD = [
    name
    for name in ONE_STAGE
    if any(action.kind == BACKWARD for actions in schedules.build(name, 2, 2).lists for action in actions)
]


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
    axis = world_axis()
    runtime, stages = stage_runtime(schedules.build(name, axis.size, 3), axis.size, axis)
    recorder = _Recorder()
    weight = stages[axis.rank].first.weight
    weight.register_post_accumulate_grad_hook(lambda _: recorder.seen.append(recorder.inside))
    runtime.step(microbatches(3), on_last_backward=recorder)
    return recorder.seen


@pytest.mark.parametrize("name", ONE_STAGE)
def test_only_the_last_backward_reduces(ranks, name):
    assert ranks(2, _last_backward, name) == [[True, True, False]] * 2


def _record_order():
    """The order of posts, sends, waits and computations of a 1F1B step of which all shapes are known."""
    axis = world_axis()
    runtime, stages = stage_runtime(schedules.build("one_f_one_b", 2, 3), 2, axis)
    runtime.step(microbatches(3))
    events = []

    noting = partial(note, events)
    mailbox.send_start = noting("send", point_to_point.send_start)
    mailbox.receive_start = noting("post", point_to_point.receive_start)
    take, finish = mailbox.Mailbox.take, mailbox.Mailbox.finish
    mailbox.Mailbox.take, mailbox.Mailbox.finish = noting("take", take), noting("finish", finish)
    stage = stages[axis.rank]
    stage.register_forward_hook(lambda *_: events.append("forward"))
    stage.first.weight.register_post_accumulate_grad_hook(lambda _: events.append("weight gradient"))
    try:
        runtime.step(microbatches(3))
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
    """The most bytes that the graph of this rank held at once: tensors autograd saved and did not free."""
    axis = world_axis()
    runtime, _ = stage_runtime(schedules.build(name, axis.size, num_microbatches), axis.size, axis)
    held, most = [0], [0]

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            held[0] += tensor.nbytes
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        runtime.step(microbatches(num_microbatches))
    return most[0], held[0]


@pytest.mark.parametrize("name", WHOLE_BACKWARD)
def test_activations_are_freed_as_soon_as_their_backward_is_done(ranks, name):
    one = ranks(4, _bytes_held, 1, name)
    held = ranks(4, _bytes_held, 8, name)
    for rank, peak in enumerate(simulate(schedules.build(name, 4, 8)).peak_in_flight):
        assert held[rank] == (peak * one[rank][0], 0)


@pytest.mark.parametrize("lists", ["F0.0 F0.1 B0.1 B0.0", "F0.0 F0.1 I0.1 I0.0 W0.0 W0.1"])
def test_what_was_received_is_freed_without_the_garbage_collector(lists):
    received = []

    def noting(number):
        weight = torch.ones(6, requires_grad=True)

        def stage(hidden, microbatch):
            if hidden is not None:
                received.append(weakref.ref(hidden))
            x = torch.tanh((microbatch if hidden is None else hidden) * weight)
            return x.sum() if number == 1 else x

        return stage

    stages = {number: noting(number) for number in range(2)}
    runtime = single_runtime(stages, written(lists))
    gc.collect()
    gc.disable()
    try:
        runtime.step(microbatches(1))
        assert [x() for x in received] == [None]
    finally:
        gc.enable()
