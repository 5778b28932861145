"""Pipeline schedules as pure lists: their order, their bubbles, the registry that finds them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.schedules import Option, Registered, explained
from pypar.pipeline_parallel.simulate import simulate
from pypar.pipeline_parallel.stage_cost import StageCost
from pypar.pipeline_parallel.validate import validate
from pypar.pipeline_parallel.validate.deadlock import buffers_needed
from tests.pipeline_parallel.stage import BIDIRECTIONAL, INTERLEAVED, RUNNING

EVEN = ["chimera", "dualpipe"]  # two directions meet in the middle
SIZES = [(p, m) for p in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 5, 8, 16)]


def text(schedule):
    return [" ".join(f"{a.kind}{a.microbatch}" for a in actions) for actions in schedule.lists]


def test_gpipe_is_all_forwards_then_all_backwards():
    assert text(schedules.build("gpipe", 2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_one_f_one_b_is_the_published_order():
    assert text(schedules.build("one_f_one_b", 3, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_one_f_one_b_with_fewer_microbatches_than_ranks():
    assert text(schedules.build("one_f_one_b", 4, 2)) == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]


@pytest.mark.parametrize("registered", schedules.REGISTRY, ids=lambda registered: registered.name)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), p=st.integers(1, 6), m=st.integers(1, 16))
def test_every_schedule_is_complete_and_cannot_deadlock(registered, data, p, m):
    """With any options, and for any costs where it takes them.

    Most also where a sender waits until the receive is posted; the others need room for a few messages an edge.
    """
    name = registered.name
    p += p % 2 * (name in EVEN)
    options = {o.name: data.draw(st.integers(1, 4)) for o in registered.options if isinstance(o.default, int)}
    costs = None
    if registered.takes_costs:
        times, shares = st.floats(0.1, 2.0), st.floats(0, 1)
        costs = [
            StageCost(*(data.draw(times) for _ in "FIW"), activation_for_weight=data.draw(shares))
            for _ in range(p * registered.stages_per_rank)
        ]
    schedule = schedules.build(name, p, m, costs=costs, communication=0.1, **options)
    validate(schedule, num_microbatches=m)
    assert schedule.num_ranks == p and all(schedule.stages_of(rank) for rank in range(p))
    # What comes early at a rank's next stage; a rank with few forwards ahead; costs of any kind.
    several = schedule.stages_per_rank > 1
    room = {
        "breadth_first": m,
        "zb_1p": p,
        "zb_2p": p,
        "zb_h1": p * several,
        "interleaved": p * (m % p > 0),
    }.get(name, 0)
    assert buffers_needed(schedule) <= room
    validate(schedule, buffers=room)
    if name in RUNNING:  # weight gradients are summed in the order of the microbatches
        for place in schedule.placement:
            actions = schedule.lists[schedule.placement[place]]
            summed = [a.microbatch for a in actions if a.place == place and a.kind in "BW"]
            assert summed == sorted(summed)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize(("name", "idle"), [("interleaved", 3), ("zb_h1", 1)])
def test_several_stages_a_rank_are_idle_alike_for_any_number_of_microbatches(name, idle, p):
    for v in (1, 2, 3):
        for m in range(p, 2 * p + 3):
            makespan = simulate(schedules.build(name, p, m, stages_per_rank=v)).makespan
            assert makespan == 3 * m * v + (p - 1) * idle, (v, m)


def test_breadth_first_needs_room_for_what_comes_early():
    """While a rank is at its first stage, microbatches arrive at its second."""
    schedule = schedules.build("breadth_first", 2, 12)
    assert buffers_needed(schedule) == 6 and buffers_needed(schedules.build("one_f_one_b", 4, 8)) == 0
    validate(schedule, buffers=6)
    with pytest.raises(
        ValueError, match="deadlocks with 5 messages under way on an edge: rank 0, .* waits for room"
    ):
        validate(schedule, buffers=5)
    with pytest.raises(ValueError, match="deadlocks with sends that wait"):
        validate(schedule, buffers=0)


@pytest.mark.parametrize("name", EVEN)
def test_two_directions_need_an_even_number_of_ranks(name):
    with pytest.raises(ValueError, match=rf"num_ranks \(3\) must be even .*{name}.*; use 4 ranks"):
        schedules.build(name, 3, 6)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize("p,m", SIZES)
def test_gpipe_and_one_f_one_b_have_the_known_bubble(name, p, m):
    schedule = schedules.build(name, p, m)
    assert schedule.placement == {(0, rank): rank for rank in range(p)}
    result = simulate(schedule)
    assert result.makespan == pytest.approx((m + p - 1) * 3)
    assert result.span_bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("p,m", SIZES)
def test_peak_in_flight(p, m):
    assert simulate(schedules.build("gpipe", p, m)).peak_in_flight == [m] * p
    assert simulate(schedules.build("one_f_one_b", p, m)).peak_in_flight == [
        min(m, p - rank) for rank in range(p)
    ]


@pytest.mark.parametrize("p,m", [(0, 1), (1, 0), (-1, 4)])
@pytest.mark.parametrize("name", schedules.names())
def test_schedule_refuses_sizes_below_one(name, p, m):
    with pytest.raises(ValueError, match="must be at least 1"):
        schedules.build(name, p, m)


def test_a_schedule_knows_its_stages_paths_and_microbatches():
    assert (INTERLEAVED.num_stages, INTERLEAVED.num_paths, INTERLEAVED.num_microbatches) == (4, 1, 2)
    assert INTERLEAVED.stages_of(1) == [(0, 1), (0, 3)]
    assert (BIDIRECTIONAL.num_stages, BIDIRECTIONAL.num_paths, BIDIRECTIONAL.num_microbatches) == (2, 2, 2)
    assert BIDIRECTIONAL.placement == {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 0}
    empty = Schedule.of([[], []])
    assert (empty.num_ranks, empty.num_stages, empty.num_paths, empty.num_microbatches) == (2, 0, 0, 0)


def test_unknown_schedule_name_suggests_the_nearest():
    known = ", ".join(schedules.names())
    with pytest.raises(ValueError, match=f"'one_f_1b' is not one of {known}; did you mean 'one_f_one_b'"):
        schedules.build("one_f_1b", 2, 2)
    with pytest.raises(ValueError, match="is not one of"):
        schedules.build("_check", 2, 2)


def test_options_are_checked_against_their_bounds_and_have_defaults():
    given = []

    def function(num_ranks, num_microbatches, *, stages_per_rank, memory):
        given.append((stages_per_rank, memory))
        return schedules.build("gpipe", num_ranks, num_microbatches)

    options = (
        Option("stages_per_rank", 2, "How many stages a rank holds.", smallest=1, largest=8),
        Option("memory", 1.0, "The limit.", smallest=0.5),
    )
    registered = Registered("looped", function, "One sentence.", options)
    registered.build(2, 2, {})
    registered.build(2, 2, {"memory": 2, "stages_per_rank": 4})
    assert given == [(2, 1.0), (4, 2)]
    for wrong, sentence in (
        (
            {"stages_per_rank": 9},
            r"stages_per_rank \(9\) of pipeline schedule looped must be at least 1 and at most 8",
        ),
        ({"memory": 0.25}, r"memory \(0.25\) of pipeline schedule looped must be at least 0.5"),
        ({"stages_per_rank": 1.5}, "must be a whole number, not 1.5"),
        ({"stages_per_rank": True}, "must be a whole number, not True"),
        ({"memory": "much"}, "must be a number, not 'much'"),
        ({"memory": float("nan")}, "must be at least 0.5"),
        (
            {"stage_per_rank": 2},
            "no option 'stage_per_rank'; it has stages_per_rank, memory; did you mean 'stages_per_rank'",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            registered.build(2, 2, wrong)
    assert explained(registered).splitlines() == [
        "looped: One sentence.",
        "    --option stages_per_rank=NUMBER: How many stages a rank holds. It is at least 1 and at most 8 "
        "and 2 by default.",
        "    --option memory=NUMBER: The limit. It is at least 0.5 and 1.0 by default.",
    ]
    with pytest.raises(ValueError, match="gpipe has no option 'v'; it has none"):
        schedules.build("gpipe", 2, 2, v=2)
