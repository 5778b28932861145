"""What a real run took, beside what was predicted."""

import time

import pytest

from pypar.pipeline_parallel import PipelineRuntime, schedules, simulate
from pypar.pipeline_parallel.picture.chart import draw
from pypar.pipeline_parallel.recorded import measured_costs, recorded
from pypar.pipeline_parallel.stage_cost import StageCost
from tests.pipeline_parallel.stage import Stage, microbatches, world_axis

LONG, SHORT = 0.06, 0.02


class Slow(Stage):
    """Takes its time for a forward: the last stage three times as long as the others."""

    def forward(self, hidden, microbatch):
        time.sleep(LONG if self.is_last else SHORT)
        return super().forward(hidden, microbatch)


def _times(name):
    axis = world_axis()
    schedule = schedules.build(name, axis.size, 4)
    stages = {stage: Slow(stage, schedule.num_stages) for _, stage in schedule.stages_of(axis.rank)}
    runtime = PipelineRuntime(stages, axis, schedule)
    for _ in range(2):
        runtime.step(microbatches(4))
    return runtime.times


@pytest.mark.parametrize("name", ["one_f_one_b", "zb_v"])
def test_a_run_is_recorded_in_the_order_of_its_lists(ranks, name, tmp_path):
    schedule = schedules.build(name, 2, 4)
    times = ranks(2, _times, name)
    result = recorded(schedule, times)
    begins = {}
    for actions, starts, row in zip(schedule.lists, result.start, result.end, strict=True):
        assert all(begin <= end for begin, end in zip(starts, row, strict=True))
        assert all(end <= begin for end, begin in zip(row, starts[1:], strict=False))
        begins |= dict(zip(actions, starts, strict=True))
    made = {schedule.sent_by(action): begin for action, begin in begins.items()}
    for action, begin in begins.items():
        needed = schedule.needed_by(action)
        assert needed is None or begin > made[needed]
    costs = measured_costs(schedule, times)
    assert all(cost.forward >= SHORT for cost in costs) and costs[-1].forward >= LONG
    # What the waiting was for does not count as work: rank 0 waits for the last stage under 1F1B.
    if name == "one_f_one_b":
        assert result.busy[0] < result.busy[1]
    predicted = simulate(schedule, costs)
    assert predicted.makespan <= result.makespan * 1.05
    draw({"predicted": predicted, "run": result}, tmp_path / "run.svg")
    assert "run: makespan" in (tmp_path / "run.svg").read_text()


def test_costs_are_medians_by_stage_and_kind():
    schedule = schedules.build("zb_h1", 1, 3)
    row, now = [], 0.0
    for action in schedule.lists[0]:
        takes = {"F": 1.0, "I": 2.0, "W": 3.0}[action.kind] + 10.0 * (action.microbatch == 0)
        row.append((now, now + takes))
        now += takes + 0.5
    assert measured_costs(schedule, [row]) == [StageCost(1.0, 2.0, 3.0)]
    result = recorded(schedule, [row])
    assert result.busy == [18 + 30] and result.start[0][0] == 0
    assert result.makespan == pytest.approx(48 + 0.5 * 8) and result.peak_in_flight == [1]
    whole = measured_costs(schedules.build("gpipe", 1, 1), [[(0, 1), (1, 5)]])
    assert whole == [StageCost(1, 0, 0, backward=4)]
    with pytest.raises(
        ValueError, match=r"there are \[1\] times of the ranks' actions, and the schedule has \[2\]"
    ):
        recorded(schedules.build("gpipe", 1, 1), [[(0, 1)]])
