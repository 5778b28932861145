"""Pipeline schedules as pure lists: their order, the validator, the simulator and the picture."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pypar.pipeline_parallel import catalog, schedules
from pypar.pipeline_parallel.action import Action, local_dependency, needed_by, sent_by, stage_ranks
from pypar.pipeline_parallel.mailbox import receive_plan
from pypar.pipeline_parallel.picture import picture, picture_of
from pypar.pipeline_parallel.runtime import forwards_of
from pypar.pipeline_parallel.simulate import StageCost, bubble_by_formula, simulate
from pypar.pipeline_parallel.validate import validate

SIZES = [(p, m) for p in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 5, 8, 16)]


def text(schedule):
    return [" ".join(f"{a.kind}{a.microbatch}" for a in actions) for actions in schedule]


def test_gpipe_is_all_forwards_then_all_backwards():
    assert text(schedules.gpipe(2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_one_f_one_b_is_the_published_order():
    assert text(schedules.one_f_one_b(3, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_one_f_one_b_with_fewer_microbatches_than_ranks():
    assert text(schedules.one_f_one_b(4, 2)) == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("p,m", SIZES)
def test_schedule_is_valid_and_has_the_known_bubble(name, p, m):
    schedule = catalog.build(name, p, m)
    validate(schedule, num_microbatches=m)
    assert stage_ranks(schedule) == {rank: rank for rank in range(p)}
    result = simulate(schedule)
    assert result.makespan == pytest.approx((m + p - 1) * 3)
    assert result.span_bubble == pytest.approx(bubble_by_formula(p, m))
    assert result.makespan_bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("p,m", SIZES)
def test_peak_in_flight(p, m):
    assert simulate(schedules.gpipe(p, m)).peak_in_flight == [m] * p
    assert simulate(schedules.one_f_one_b(p, m)).peak_in_flight == [min(m, p - rank) for rank in range(p)]


@pytest.mark.parametrize("p,m", [(0, 1), (1, 0), (-1, 4)])
@pytest.mark.parametrize("name", catalog.names())
def test_schedule_refuses_sizes_below_one(name, p, m):
    with pytest.raises(ValueError, match="must be at least 1"):
        catalog.build(name, p, m)


def test_unknown_schedule_name_suggests_the_nearest():
    assert catalog.names() == ["gpipe", "one_f_one_b"]
    with pytest.raises(
        ValueError, match="'one_f_1b' is not one of gpipe, one_f_one_b; did you mean 'one_f_one_b'"
    ):
        catalog.build("one_f_1b", 2, 2)
    with pytest.raises(ValueError, match="is not one of"):
        catalog.build("_check", 2, 2)


# Rows: ranks, microbatches, T_F, T_B, T_W, T_comm in ms, and the bubble rate that the paper prints for 1F1B
# (zero-bubble paper, arXiv 2401.10241, tables 9 and 5; its B is the input gradient).
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552),
    (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251),
]


@pytest.mark.parametrize("p,m,t_f,t_b,t_w,t_comm,rate", PUBLISHED)
def test_simulator_reproduces_the_published_1f1b_bubbles(p, m, t_f, t_b, t_w, t_comm, rate):
    result = simulate(schedules.one_f_one_b(p, m), StageCost(t_f, t_b, t_w), t_comm)
    assert round(result.span_bubble, 4) == rate


def test_split_backward_delays_weight_gradients_and_shortens_the_step():
    """W fills the idle tail: the closed formula of arXiv 2401.10241 gives (p-1)(F+B-W) for 2 ranks."""
    m = 6
    split = [
        "F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 F4 I3 W3 F5 I4 W4 I5 W5",
        "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 F4 I4 W3 F5 I5 W4 W5",
    ]
    schedule = [[Action(w[0], rank, int(w[1:])) for w in line.split()] for rank, line in enumerate(split)]
    result = simulate(schedule)
    assert result.span == m * 3 + 1  # F + I - W = 1 idle, against F + I + W = 3 of 1F1B
    assert simulate(schedules.one_f_one_b(2, m)).span == m * 3 + 3


def test_memory_of_split_backward():
    actions = [Action("F", 0, 0), Action("F", 0, 1), Action("I", 0, 0), Action("F", 0, 2)]
    actions += [Action("W", 0, 0), Action("I", 0, 1), Action("W", 0, 1), Action("I", 0, 2), Action("W", 0, 2)]
    result = simulate([actions], StageCost(activation=10.0, activation_for_weight=4.0))
    assert result.peak_memory == [24.0]  # 4 of microbatch 0 left, 10 each of 1 and 2
    assert result.peak_in_flight == [3]
    assert simulate([actions], StageCost(activation=10.0)).peak_memory == [30.0]


def test_unequal_stages_and_communication():
    costs = [StageCost(forward=1, backward=2), StageCost(forward=3, backward=5)]
    result = simulate(
        schedules.one_f_one_b(2, 2), costs, lambda sender, receiver: 0.5 if sender == 0 else 0.25
    )
    assert result.start[1] == [1.5, 4.5, 9.5, 12.5]
    assert result.start[0] == [0.0, 1.0, 9.75, 17.75]
    assert result.busy == [6.0, 16.0]
    assert result.makespan == 19.75
    with pytest.raises(ValueError, match="costs has 1 entries but the schedule has 2 stages"):
        simulate(schedules.gpipe(2, 1), [StageCost()])


def _replaced(schedule, rank, position, *actions):
    lists = [list(actions_of_rank) for actions_of_rank in schedule]
    lists[rank][position : position + 1] = actions
    return lists


PLANTED = {
    "missing B": (
        _replaced(schedules.one_f_one_b(2, 2), 1, 3),
        "rank 1, position 3 .*B of stage 1, microbatch 1 is missing",
    ),
    "missing F": (
        _replaced(schedules.gpipe(2, 2), 0, 1),
        "rank 0, position 3 .*F of stage 0, microbatch 1 is missing",
    ),
    "F twice": (
        _replaced(schedules.gpipe(1, 2), 0, 1, Action("F", 0, 1), Action("F", 0, 1)),
        "rank 0, position 2: F.* already ran at rank 0, position 1",
    ),
    "B and W": (
        _replaced(schedules.gpipe(1, 1), 0, 1, Action("B", 0, 0), Action("W", 0, 0)),
        "rank 0, position 2: W of stage 0, microbatch 0 comes beside its B",
    ),
    "I without W": (
        _replaced(schedules.gpipe(1, 1), 0, 1, Action("I", 0, 0)),
        "W of stage 0, microbatch 0 is missing",
    ),
    "W without I": (
        _replaced(schedules.gpipe(1, 1), 0, 1, Action("W", 0, 0)),
        "I of stage 0, microbatch 0 is missing",
    ),
    "W before I": (
        _replaced(schedules.gpipe(1, 1), 0, 1, Action("W", 0, 0), Action("I", 0, 0)),
        r"rank 0, position 1: W.* comes before I.* at position 2",
    ),
    "B before F": (
        [[Action("B", 0, 0), Action("F", 0, 0)]],
        r"rank 0, position 0: B.* comes before F.* at position 1",
    ),
    "stage on two ranks": (
        [[Action("F", 0, 0), Action("B", 0, 0)], [Action("F", 0, 1), Action("B", 0, 1)]],
        "rank 1, position 0: .* lives on rank 0",
    ),
    "stage left out": ([[Action("F", 1, 0), Action("B", 1, 0)]], "no rank runs stage 0"),
    "unknown kind": ([[Action("X", 0, 0)]], "rank 0, position 0: .*kind 'X'"),
    "empty": ([[], []], "no action"),
    "deadlock": (
        [
            [Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)],
            [Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1)],
        ],
        "deadlocks: rank 0, position 1: B.* waits for the gradient of microbatch 0 from stage 1; "
        "rank 1, position 1: F.* waits for the activation of microbatch 1 from stage 0",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_validator_names_the_planted_fault(fault):
    schedule, message = PLANTED[fault]
    with pytest.raises(ValueError, match=message):
        validate(schedule)


def test_validator_knows_forward_only_and_the_number_of_microbatches():
    validate(forwards_of({0: 0, 1: 1}, 2, 3), forward_only=True)
    with pytest.raises(ValueError, match="B of stage 0, microbatch 0 in a forward-only schedule"):
        validate(schedules.gpipe(1, 1), forward_only=True)
    with pytest.raises(ValueError, match="F of stage 0, microbatch 2 is missing"):
        validate(schedules.gpipe(2, 2), num_microbatches=3)
    with pytest.raises(ValueError, match="out of range"):
        validate(schedules.gpipe(2, 2), num_microbatches=1)


@st.composite
def random_schedules(draw):
    """Any valid schedule: all actions in a random order that their dependencies allow, dealt to the ranks."""
    num_ranks = draw(st.integers(1, 4))
    num_stages = num_ranks * draw(st.integers(1, 2))
    num_microbatches = draw(st.integers(1, 4))
    pick = random.Random(draw(st.integers(0, 2**32)))
    owners = [stage % num_ranks for stage in range(num_stages)]
    pick.shuffle(owners)
    waiting = []
    for stage in range(num_stages):
        for microbatch in range(num_microbatches):
            kinds = pick.choice(["FB", "FIW"])
            waiting += [Action(kind, stage, microbatch) for kind in kinds]
    schedule: list[list[Action]] = [[] for _ in range(num_ranks)]
    done, sent = set(), set()
    while waiting:
        ready = [
            a
            for a in waiting
            if needed_by(a, num_stages) in {None, *sent} and local_dependency(a) in {None, *done}
        ]
        action = pick.choice(ready)
        waiting.remove(action)
        done.add(action)
        sent.add(sent_by(action, num_stages))
        schedule[owners[action.stage]].append(action)
    return schedule


@settings(max_examples=60, deadline=None)
@given(random_schedules(), st.integers(0, 2**32))
def test_every_valid_schedule_simulates(schedule, seed):
    validate(schedule)
    times = random.Random(seed)
    num_stages = len(stage_ranks(schedule))
    costs = [StageCost(times.random(), times.random(), times.random()) for _ in range(num_stages)]
    result = simulate(schedule, costs, 0.3)
    ends = {
        a: e
        for actions, row in zip(schedule, result.end, strict=True)
        for a, e in zip(actions, row, strict=True)
    }
    made = {sent_by(a, num_stages): e for a, e in ends.items()}
    for actions, starts, row in zip(schedule, result.start, result.end, strict=True):
        assert all(s >= e for s, e in zip(starts[1:], row, strict=False))  # a rank does one thing at a time
        for action, start in zip(actions, starts, strict=True):
            if needed_by(action, num_stages):
                assert start >= made[needed_by(action, num_stages)]
    assert result.makespan >= result.span >= max(result.busy)
    assert 0 <= result.span_bubble < 1
    picture(result)


@settings(max_examples=60, deadline=None)
@given(random_schedules())
def test_receives_are_posted_in_time_in_the_senders_order_and_once(schedule):
    owners = stage_ranks(schedule)
    for rank, actions in enumerate(schedule):
        plan = receive_plan(schedule, rank)
        posted = []
        for action, messages in zip(actions, plan, strict=True):
            posted += messages
            needed = needed_by(action, len(owners))
            assert needed is None or owners[needed.sender] == rank or needed in posted
        assert len(posted) == len(set(posted))
        for other in range(len(schedule)):
            if other == rank:
                continue
            sent = [sent_by(a, len(owners)) for a in schedule[other]]
            to_here = [message for message in sent if message is not None and owners[message.stage] == rank]
            assert [message for message in posted if owners[message.sender] == other] == to_here


def test_receives_are_posted_one_ahead():
    """While a middle rank of 1F1B computes, its next activation and its next gradient are on their way."""
    schedule = schedules.one_f_one_b(3, 4)
    plan = [[f"{m.kind[0]}{m.microbatch}" for m in messages] for messages in receive_plan(schedule, 1)]
    assert plan == [["a0", "g0", "a1"], ["a2"], ["g1"], ["a3"], ["g2"], [], ["g3"], []]


def test_picture_of_one_f_one_b():
    assert picture_of(schedules.one_f_one_b(2, 2)).splitlines() == [
        "rank 0 |F0 F1 .. .. B0 -- .. B1 --|",
        "rank 1 |.. F0 B0 -- F1 B1 -- .. ..|",
        "bubble 33.33%, peak microbatches in flight [2, 1]",
    ]


def test_picture_names_stages_where_a_rank_has_several():
    schedule = [[Action("F", 0, 0), Action("F", 1, 0), Action("B", 1, 0), Action("B", 0, 0)]]
    assert picture_of(schedule).splitlines()[0] == "rank 0 |F0.0 F0.1 B0.1 ---- B0.0 ----|"
    with pytest.raises(ValueError, match="time_per_cell"):
        picture(simulate(schedule), time_per_cell=0)
