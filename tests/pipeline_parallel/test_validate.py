"""The validator of pipeline schedules: what is valid, and each planted fault by rank and position."""

import pytest

from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Action, Schedule
from pypar.pipeline_parallel.forward_only import forwards_of
from pypar.pipeline_parallel.stage_cost import StageCost
from pypar.pipeline_parallel.validate import validate
from pypar.pipeline_parallel.validate.versions import weight_versions
from tests.pipeline_parallel.stage import BIDIRECTIONAL, INTERLEAVED, written


def _replaced(schedule, rank, position, *actions):
    """A schedule with one action replaced by these."""
    lists = [list(actions_of_rank) for actions_of_rank in schedule.lists]
    lists[rank][position : position + 1] = actions
    return Schedule.of(lists, schedule.placement)


PLANTED = {
    "missing B": (
        _replaced(schedules.build("one_f_one_b", 2, 2), 1, 3),
        "rank 1, position 3 .*B of stage 1, microbatch 1 is missing",
    ),
    "missing F": (
        _replaced(schedules.build("gpipe", 2, 2), 0, 1),
        "rank 0, position 3 .*F of stage 0, microbatch 1 is missing",
    ),
    "F twice": (
        _replaced(schedules.build("gpipe", 1, 2), 0, 1, Action("F", 0, 1), Action("F", 0, 1)),
        "rank 0, position 2: F.* already ran at rank 0, position 1",
    ),
    "B and W": (
        _replaced(schedules.build("gpipe", 1, 1), 0, 1, Action("B", 0, 0), Action("W", 0, 0)),
        "rank 0, position 2: W of stage 0, microbatch 0 comes beside its B",
    ),
    "I without W": (
        _replaced(schedules.build("gpipe", 1, 1), 0, 1, Action("I", 0, 0)),
        "W of stage 0, microbatch 0 is missing",
    ),
    "W without I": (
        _replaced(schedules.build("gpipe", 1, 1), 0, 1, Action("W", 0, 0)),
        "I of stage 0, microbatch 0 is missing",
    ),
    "W before I": (
        _replaced(schedules.build("gpipe", 1, 1), 0, 1, Action("W", 0, 0), Action("I", 0, 0)),
        r"rank 0, position 1: W.* comes before I.* at position 2",
    ),
    "B before F": (written("B0 F0"), r"rank 0, position 0: B.* comes before F.* at position 1"),
    "stage on two ranks": (written("F0.0 B0.0", "F1.0 B1.0"), "rank 1, position 0: .* lives on rank 0"),
    "stage of no rank": (written("F0 B0 F0.1", placement={(0, 0): 0}), "position 2: .* lives on no rank"),
    "stage left out": (written("F0.1 B0.1"), "no rank runs stage 0 although stage 1 exists"),
    "unknown kind": (written("X0"), "rank 0, position 0: .*kind 'X'"),
    "empty": (written("", ""), "no action"),
    "deadlock": (
        written("F0 B0 F1 B1", "F0 F1 B0 B1"),
        "deadlocks: rank 0, position 1: B.* waits for the gradient of microbatch 0 from stage 1; "
        "rank 1, position 1: F.* waits for the activation of microbatch 1 from stage 0",
    ),
    "interleaved deadlock": (
        _replaced(_replaced(INTERLEAVED, 0, 0, Action("F", 2, 0)), 0, 2, Action("F", 0, 0)),
        r"rank 0, position 0: F\(stage 2, microbatch 0\) waits for the activation of microbatch 0 from stage 1",
    ),
    "missing F of a second stage": (
        _replaced(INTERLEAVED, 1, 4),
        r"rank 1, position 7 .*F of stage 3, microbatch 1 is missing",
    ),
    "two paths": (
        _replaced(BIDIRECTIONAL, 0, 1, Action("F", 1, 0, 1)),
        r"rank 0, position 1: F\(path 1, stage 1, microbatch 0\) is on path 1, but microbatch 0 also goes along path 0",
    ),
    "path with a stage less": (
        written("F0.0 F1.0' B1.0' B0.0", "F0.1 B0.1"),
        "no rank runs stage 1 of path 1 although stage 1 exists",
    ),
    "missing B of a path": (
        _replaced(BIDIRECTIONAL, 1, 3),
        "rank 1, position 3 .*: B of path 1, stage 0, microbatch 1 is missing",
    ),
    "placement on a rank that is not there": (
        written("F0 B0", placement={(0, 0): 1}),
        "puts stage 0 on rank 1; .* ranks from 0 to 0",
    ),
    "update before its gradient": (
        written("F0 U0 B0"),
        r"rank 0, position 1: U.* comes before B.* at position 2",
    ),
    "update before its weight gradient": (
        written("F0 I0 U0 W0"),
        r"position 2: U.* comes before W.* at position 3",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_validator_names_the_planted_fault(fault):
    schedule, message = PLANTED[fault]
    with pytest.raises(ValueError, match=message):
        validate(schedule)


def test_validator_knows_forward_only_and_the_number_of_microbatches():
    validate(forwards_of(schedules.build("gpipe", 2, 1), 3), forward_only=True)
    with pytest.raises(ValueError, match="B of stage 0, microbatch 0 in a forward-only schedule"):
        validate(schedules.build("gpipe", 1, 1), forward_only=True)
    with pytest.raises(ValueError, match="U of stage 0, microbatch 0 in a forward-only schedule"):
        validate(written("F0 U0"), forward_only=True)
    with pytest.raises(ValueError, match="F of stage 0, microbatch 2 is missing"):
        validate(schedules.build("gpipe", 2, 2), num_microbatches=3)
    with pytest.raises(ValueError, match="out of range"):
        validate(schedules.build("gpipe", 2, 2), num_microbatches=1)


def test_valid_schedules_of_every_shape():
    for schedule in (INTERLEAVED, BIDIRECTIONAL, forwards_of(INTERLEAVED, 5), forwards_of(BIDIRECTIONAL, 3)):
        validate(schedule, forward_only=all(a.kind == "F" for actions in schedule.lists for a in actions))
    validate(written("F0 F1 I0 W0 U0 I1 W1 U1", "F0 B0 U0 F1 B1 U1", delays={(0, 0): 1}))


def test_memory_limit_names_the_action_that_breaks_it():
    schedule = schedules.build("one_f_one_b", 2, 3)
    validate(schedule, memory_limit=[2, 1])
    with pytest.raises(
        ValueError, match=r"rank 0, position 1: F.* makes the activations held 2, over .* of 1"
    ):
        validate(schedule, memory_limit=1)
    costs = [StageCost(activation=8.0, activation_for_weight=3.0), StageCost(activation=5.0)]
    split = written("F0 F1 I0 F2 W0 I1 W1 I2 W2", "F0 B0 F1 B1 F2 B2")
    validate(split, costs=costs, memory_limit=[19.0, 5.0])
    with pytest.raises(ValueError, match="rank 0, position 3: F.* held 19, over the limit of 18.5"):
        validate(split, costs=costs, memory_limit=18.5)
    with pytest.raises(ValueError, match="memory_limit has 3 entries but the schedule has 2 ranks"):
        validate(schedule, memory_limit=[1, 2, 3])


def test_a_fault_shows_the_list_around_it_with_an_arrow():
    schedule = written("F0 F1 F2 F3 F4 B0 B1 B2 B4 B3 B2")
    with pytest.raises(ValueError) as raised:
        validate(schedule)
    sentence, *lines = str(raised.value).splitlines()
    assert sentence.startswith(
        "rank 0, position 10: B(stage 0, microbatch 2) already ran at rank 0, position 7"
    )
    assert lines[0] == "  rank 0 | ... F3 F4 B0 B1 B2 B4 B3 B2"
    assert lines[1].index("^") == lines[0].index("B2")
    assert lines[2] == "  rank 0 | ... B1 B2 B4 B3 B2"
    assert lines[3].index("^") == lines[2].rindex("B2")
    with pytest.raises(ValueError) as raised:
        validate(written("F0 B0 F1 B1", "F0 F1 B0 B1"))
    assert str(raised.value).splitlines()[1:] == [
        "  rank 0 | F0 B0 F1 B1",
        "              ^",
        "  rank 1 | F0 F1 B0 B1",
        "              ^",
    ]
    with pytest.raises(ValueError) as raised:  # behind the end of a list
        validate(written("F0 F1 B0"))
    assert str(raised.value).splitlines()[1:] == ["  rank 0 | F0 F1 B0", "                    ^"]


PAIRS = {
    "not a forward and a backward": (
        written("F0 F1 B0 B1", pairs=[(0, 0)]),
        "F.*0\\) and F.*1\\) cannot run as one",
    ),
    "one microbatch": (
        written("F0 B0", pairs=[(0, 0)]),
        "cannot run as one; a pair is an F and behind it a B",
    ),
    "at the end": (written("F0 B0", pairs=[(0, 1)]), "position 1: B.* cannot run as one"),
    "no such rank": (written("F0 B0", pairs=[(3, 0)]), "rank 3, position 0: nothing cannot run as one"),
    "deadlock": (
        # Alone the lists run; as one with F1, B0 waits for rank 1, which needs what B0's partner makes.
        written("F0 F1 B0 B1", "F0 F1 B0 B1", pairs=[(0, 1)]),
        "deadlocks: rank 0, position 1: F.*1\\) waits for the gradient of microbatch 0",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_validator_names_what_is_wrong_with_a_pair(name):
    schedule, message = PAIRS[name]
    with pytest.raises(ValueError, match=message):
        validate(schedule)


def test_segments_need_those_before_them():
    validate(written("F0 F1 B1 B0 F2 F3 B3 B2", num_segments=2), num_microbatches=2)
    with pytest.raises(ValueError, match=r"position 0: F\(.*1\) comes before F\(.*0\) at position 1"):
        validate(written("F1 F0 B1 B0", num_segments=2))
    with pytest.raises(ValueError, match=r"position 2: B\(.*0\) comes before B\(.*1\) at position 3"):
        validate(written("F0 F1 B0 B1", num_segments=2))
    with pytest.raises(ValueError, match=r"position 2: I\(.*0\) comes before I\(.*1\) at position 4"):
        validate(written("F0 F1 I0 W0 I1 W1", num_segments=2))
    with pytest.raises(ValueError, match="F of stage 0, microbatch 2 is missing"):
        validate(written("F0 F1 B1 B0", num_segments=2), num_microbatches=2)


VERSIONS = {
    "an old version without a delay": (
        written("F0 F1 B0 U0 B1 U1"),
        r"rank 0, position 1: F\(.*1\) needs version 1 of the stage's weights, and 0 updates come before it",
    ),
    "a gradient of the batch is missing": (
        written("F0 F1 B1 U1 B0"),
        r"position 3: U\(.*1\) comes too early: the gradient of microbatch 0 is not there",
    ),
    "updates that go back": (
        written("F0 F1 B0 B1 U1 U0"),
        r"position 5: U\(.*0\) has nothing to take in: an update before took in .* up to microbatch 1",
    ),
    "a last batch without an update": (
        written("F0 B0 U0 F1 B1"),
        "position 5 .*no U of stage 0 takes in the gradient of microbatch 1",
    ),
    "a stage without updates": (
        written("F0 B0 U0", "F0 B0"),
        "rank 1, position 2 .*no U of stage 1",
    ),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_validator_names_what_is_wrong_with_versions(name):
    schedule, message = VERSIONS[name]
    with pytest.raises(ValueError, match=message):
        validate(schedule)


def test_versions_that_are_kept():
    pipedream, two = schedules.build("pipedream", 4, 9), schedules.build("pipedream_2bw", 4, 9)
    assert weight_versions(pipedream) == [4, 3, 2, 1] and weight_versions(two) == [2] * 4
    assert weight_versions(schedules.build("one_f_one_b", 4, 9)) == [1] * 4
    validate(pipedream, versions_limit=4)
    validate(two, versions_limit=2)
    with pytest.raises(
        ValueError, match="rank 0 keeps 4 versions of a stage's weights, and versions_limit is 3"
    ):
        validate(pipedream, versions_limit=3)


@pytest.mark.parametrize("num_segments", [0, -2, 3])
def test_segments_that_cut_no_microbatch_are_refused(num_segments):
    lists = schedules.build("gpipe", 1, 4).lists
    with pytest.raises(
        ValueError, match=rf"num_segments \({num_segments}\) must be at least 1 and divide the 4"
    ):
        validate(Schedule.of(lists, num_segments=num_segments))
