"""Asynchronous schedules: what their lists and delays mean, in numbers."""

import numpy as np
import pytest

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import FORWARD, UPDATE
from pypar.pipeline_parallel.validate.versions import updates_of, version_used

RATE, NUM_MICROBATCHES = 0.1, 12


def _interpreted(schedule, xs):
    """The weights of y = w1 w0 x after descent on (y - 3x)^2 / 2, one weight a stage, by a schedule's lists."""
    updates = updates_of(schedule)
    versions = {place: [1.0] for place in schedule.placement}
    inputs, gradients, sums = {}, {}, dict.fromkeys(schedule.placement, 0.0)
    counts = dict.fromkeys(schedule.placement, 0)
    lists = [list(actions) for actions in schedule.lists]
    while any(lists):
        for actions in lists:
            if not actions or (actions[0].stage, actions[0].kind) in ((1, FORWARD), (0, "B")):
                source = inputs if actions and actions[0].kind == FORWARD else gradients
                if not actions or (actions[0].stage, actions[0].microbatch) not in source:
                    continue
            action = actions.pop(0)
            place, i = action.place, action.microbatch
            if action.kind == UPDATE:
                versions[place].append(versions[place][-1] - RATE * sums[place] / counts[place])
                sums[place], counts[place] = 0.0, 0
                continue
            weight = versions[place][version_used(schedule, updates, action)]
            x = inputs.setdefault((0, i), xs[i]) if action.stage == 0 else inputs[1, i]
            if action.kind == FORWARD:
                if action.stage == 0:
                    inputs[1, i] = weight * x
                else:
                    gradients[1, i] = weight * x - 3 * xs[i]
                continue
            gradient = gradients[action.stage, i]
            sums[place] += gradient * x
            counts[place] += 1
            if action.stage == 1:
                gradients[0, i] = gradient * weight
    return [versions[0, stage][-1] for stage in (0, 1)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pipedream", (1.743473611, 1.730883013)), ("pipedream_2bw", (1.714816013, 1.714816013))],
)
def test_weights_are_those_of_a_program_that_keeps_all_versions(name, expected):
    """PipeDream makes an update a microbatch; PipeDream-2BW on two stages one after every two microbatches."""
    xs = np.random.RandomState(0).randn(64)[:NUM_MICROBATCHES]
    schedule = schedules.build(name, 2, NUM_MICROBATCHES)
    assert _interpreted(schedule, xs) == pytest.approx(expected, abs=1e-9)


def test_without_a_delay_it_is_the_synchronous_program():
    xs = np.random.RandomState(0).randn(64)[:NUM_MICROBATCHES]
    w = np.ones(2)
    for first in range(0, NUM_MICROBATCHES, 2):
        x = xs[first : first + 2]
        error = w[0] * w[1] * x - 3 * x
        w = w - RATE * np.array([np.mean(error * w[1] * x), np.mean(error * w[0] * x)])
    assert w == pytest.approx((1.722307326, 1.722307326), abs=1e-9)
