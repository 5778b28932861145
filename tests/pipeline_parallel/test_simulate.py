"""The simulator of pipeline schedules, its picture, and when receives are posted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.messages.receive_order import receive_order
from pypar.pipeline_parallel.picture import picture, picture_of
from pypar.pipeline_parallel.simulate import simulate
from pypar.pipeline_parallel.stage_cost import StageCost
from pypar.pipeline_parallel.validate import validate
from tests.pipeline_parallel.stage import BIDIRECTIONAL, INTERLEAVED, random_schedule, written


def test_split_backward_delays_weight_gradients_and_shortens_the_step():
    """W fills the idle tail: the closed formula of arXiv 2401.10241 gives (p-1)(F+B-W) for 2 ranks."""
    m = 6
    schedule = written(
        "F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 F4 I3 W3 F5 I4 W4 I5 W5",
        "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 F4 I4 W3 F5 I5 W4 W5",
    )
    result = simulate(schedule)
    assert result.span == m * 3 + 1  # F + I - W = 1 idle, against F + I + W = 3 of 1F1B
    assert simulate(schedules.build("one_f_one_b", 2, m)).span == m * 3 + 3


def test_memory_of_split_backward():
    schedule = written("F0 F1 I0 F2 W0 I1 W1 I2 W2")
    result = simulate(schedule, StageCost(activation=10.0, activation_for_weight=4.0))
    assert result.peak_memory == [24.0]  # 4 of microbatch 0 left, 10 each of 1 and 2
    assert result.peak_in_flight == [3]
    assert simulate(schedule, StageCost(activation=10.0)).peak_memory == [30.0]


def test_interleaved_stages():
    """A rank's stages share its time; what passes between ranks needs time, and all peaks count both stages."""
    result = simulate(INTERLEAVED)
    assert result.makespan == 15 and result.busy == [12, 12]
    assert result.start[0] == [0, 1, 2, 3, 6, 9, 11, 13] and result.start[1] == [1, 2, 3, 4, 6, 7, 9, 11]
    assert result.peak_in_flight == [4, 3]
    costs = [StageCost(1, 1, 1, activation=a) for a in (1.0, 10.0, 100.0, 1000.0)]
    assert simulate(INTERLEAVED, costs).peak_memory == [202.0, 1020.0]
    slow_last = [StageCost()] * 3 + [StageCost(forward=2.0, backward=5.0)]
    assert simulate(INTERLEAVED, slow_last, lambda sender, _: 0.5 * (sender == 2)).start[1] == (
        [1, 2, 3.5, 5.5, 10.5, 12.5, 17.5, 20]
    )


def test_two_paths_in_opposite_directions():
    result = simulate(BIDIRECTIONAL)
    assert result.makespan == 6 and result.span_bubble == 0
    assert result.peak_in_flight == [2, 2]
    costs = [StageCost(activation=1.0), StageCost(forward=3.0, activation=5.0)]
    result = simulate(BIDIRECTIONAL, costs, 0.25)  # both copies of a stage cost the same
    assert result.start == [[0, 1.25, 4.25, 6.5], [0, 1.25, 4.25, 6.5]]
    assert result.peak_memory == [6.0, 6.0]


def test_updates_take_their_time():
    schedule = written("F0 B0 U0 F1 B1 U1")
    assert simulate(schedule, StageCost(update=0.5)).makespan == 7
    assert simulate(schedule).makespan == 6


def test_unequal_stages_and_communication():
    costs = [StageCost(forward=1, backward=2), StageCost(forward=3, backward=5)]
    result = simulate(
        schedules.build("one_f_one_b", 2, 2), costs, lambda sender, receiver: 0.5 if sender == 0 else 0.25
    )
    assert result.start[1] == [1.5, 4.5, 9.5, 12.5]
    assert result.start[0] == [0.0, 1.0, 9.75, 17.75]
    assert result.busy == [6.0, 16.0]
    assert result.makespan == 19.75
    with pytest.raises(ValueError, match="costs has 1 entries but the schedule has 2 stages"):
        simulate(schedules.build("gpipe", 2, 1), [StageCost()])


@st.composite
def random_schedules(draw):
    """Any valid schedule: all actions in a random order that their dependencies allow, dealt to the ranks."""
    num_ranks = draw(st.integers(1, 4))
    owners = [stage % num_ranks for stage in range(num_ranks * draw(st.integers(1, 2)))]
    random.Random(draw(st.integers(0, 2**32))).shuffle(owners)
    seed = draw(st.integers(0, 2**32))
    return random_schedule(owners, draw(st.integers(1, 4)), seed, splits=draw(st.booleans()), in_order=False)


@settings(max_examples=60, deadline=None)
@given(random_schedules(), st.integers(0, 2**32))
def test_every_valid_schedule_simulates(schedule, seed):
    validate(schedule)
    times = random.Random(seed)
    costs = [StageCost(times.random(), times.random(), times.random()) for _ in range(schedule.num_stages)]
    result = simulate(schedule, costs, 0.3)
    ends = {
        a: e
        for actions, row in zip(schedule.lists, result.end, strict=True)
        for a, e in zip(actions, row, strict=True)
    }
    made = {schedule.sent_by(a): e for a, e in ends.items()}
    for actions, starts, row in zip(schedule.lists, result.start, result.end, strict=True):
        assert all(s >= e for s, e in zip(starts[1:], row, strict=False))  # a rank does one thing at a time
        for action, start in zip(actions, starts, strict=True):
            needed = schedule.needed_by(action)
            if needed:
                near = schedule.placement[needed.sender] == schedule.placement[needed.receiver]
                assert start >= made[needed] + (0.0 if near else 0.3)
    assert result.makespan >= result.span >= max(result.busy)
    assert 0 <= result.span_bubble < 1
    picture(result)


@settings(max_examples=60, deadline=None)
@given(random_schedules())
def test_receives_are_posted_in_time_in_the_senders_order_and_once(schedule):
    placement = schedule.placement
    for rank, actions in enumerate(schedule.lists):
        receives = receive_order(schedule, rank)
        posted = []
        for action, messages in zip(actions, receives, strict=True):
            posted += messages
            needed = schedule.needed_by(action)
            assert needed is None or placement[needed.sender] == rank or needed in posted
        assert len(posted) == len(set(posted))
        for other in range(schedule.num_ranks):
            if other == rank:
                continue
            sent = [schedule.sent_by(a) for a in schedule.lists[other]]
            to_here = [m for m in sent if m is not None and placement[m.receiver] == rank]
            assert [m for m in posted if placement[m.sender] == other] == to_here


def test_receives_are_posted_one_ahead():
    """While a middle rank of 1F1B computes, its next activation and its next gradient are on their way."""
    schedule = schedules.build("one_f_one_b", 3, 4)
    receives = [[f"{m.kind[0]}{m.microbatch}" for m in messages] for messages in receive_order(schedule, 1)]
    assert receives == [["a0", "g0", "a1"], ["a2"], ["g1"], ["a3"], ["g2"], [], ["g3"], []]


def test_picture_of_one_f_one_b():
    assert picture_of(schedules.build("one_f_one_b", 2, 2)).splitlines() == [
        "rank 0 |F0 F1 .. .. B0 -- .. B1 --|",
        "rank 1 |.. F0 B0 -- F1 B1 -- .. ..|",
        "bubble 33.33%, peak microbatches in flight [2, 1]",
    ]


def test_picture_names_stages_where_a_rank_has_several():
    schedule = written("F0.0 F0.1 B0.1 B0.0")
    assert picture_of(schedule).splitlines()[0] == "rank 0 |F0.0 F0.1 B0.1 ---- B0.0 ----|"
    with pytest.raises(ValueError, match="time_per_cell"):
        picture(simulate(schedule), time_per_cell=0)


def test_picture_of_interleaved_stages_and_of_two_paths():
    assert picture_of(INTERLEAVED).splitlines() == [
        "rank 0 |F0.0 F1.0 F0.2 F1.2 .... .... B0.2 ---- .... B1.2 ---- B0.0 ---- B1.0 ----|",
        "rank 1 |.... F0.1 F1.1 F0.3 B0.3 ---- F1.3 B1.3 ---- B0.1 ---- B1.1 ---- .... ....|",
        "bubble 20.00%, peak microbatches in flight [4, 3]",
    ]
    assert picture_of(BIDIRECTIONAL).splitlines()[:2] == [
        "rank 0 |F0.0  F1.1' B1.1' ----- B0.0- -----|",
        "rank 1 |F1.0' F0.1  B0.1- ----- B1.0' -----|",
    ]
