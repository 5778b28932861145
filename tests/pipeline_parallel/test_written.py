"""Schedules as CSV: there and back, what torch writes, and what is refused."""

import types

import pytest

from pypar.pipeline_parallel import schedules, validate
from pypar.pipeline_parallel.action import Action
from pypar.pipeline_parallel.written import read_schedule, write_schedule


@pytest.mark.parametrize("name", schedules.names())
def test_every_schedule_is_read_as_it_was_written(name):
    schedule = schedules.build(name, 4, 10)
    assert read_schedule(write_schedule(schedule)) == schedule


def test_cells_are_those_of_torch():
    """torch.distributed.pipelining writes idle slots as empty cells, and pairs as one cell."""
    text = "0F0,0F1,,0I0,0W0,(2F0;0B1)OVERLAP_F_B\n,1F0, 1F1,1B0,,1B1\n"
    schedule = read_schedule(text)
    assert schedule.lists[0][-2:] == (Action("F", 2, 0), Action("B", 0, 1)) and schedule.pairs == {(0, 4)}
    assert schedule.lists[1] == tuple(Action(kind, 1, i) for kind in "FB" for i in range(2))
    assert write_schedule(schedule) == "0F0,0F1,0I0,0W0,(2F0;0B1)OVERLAP_F_B\n1F0,1F1,1B0,1B1\n"


@pytest.mark.parametrize(
    ("name", "torch_name", "num_stages"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", 2),
        ("zb_h1", "ScheduleInterleavedZeroBubble", 1),
        ("zb_v", "ScheduleZBVZeroBubble", 2),
        ("dualpipe_v", "ScheduleDualPipeV", 2),
    ],
)
def test_the_lists_are_those_of_torch(name, torch_name, num_stages):
    """As its CSV says; in numbers of microbatches that torch takes."""
    theirs = pytest.importorskip("torch.distributed.pipelining.schedules")
    if not hasattr(theirs, torch_name):
        pytest.skip(f"this torch has no {torch_name}")
    for p, m in ((2, 4), (4, 8), (4, 12)):
        given = types.SimpleNamespace(
            pp_group_size=p,
            _n_microbatches=m,
            n_local_stages=num_stages,
            num_stages=num_stages * p,
            microbatches_per_round=p,
        )
        of_rank = getattr(theirs, torch_name)._calculate_single_rank_operations
        lines = [",".join("" if a is None else str(a) for a in of_rank(given, rank)) for rank in range(p)]
        schedule = read_schedule("\n".join(lines))
        assert schedule.pairs or name != "dualpipe_v"
        assert schedule == schedules.build(name, p, m)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "0F0,B0",
            "line 1 of the schedule's text has 'B0'; an action is a stage, one of F, B, I, W, U and a",
        ),
        ("0F0\n\n1X0", "line 3 .*'1X0'"),
        ("(0F0;0B0)OVERLAP", "line 1"),
        ("# stages=3\n0F0", "says stages; lines with # say num_segments or delays"),
        (
            "# num_segments=x\n0F0,0B0",
            "num_segments=x; num_segments must be whole numbers that are at least 1",
        ),
        ("# num_segments=0\n0F0,0B0", "num_segments=0"),
        ("# num_segments=2\n# num_segments=1\n0F0,0B0", "line 2 .* says num_segments again"),
        ("# delays=0;b\n0F0,0B0", "delays=b; delays must be whole numbers that are at least 0"),
        ("# delays=-1\n0F0,0B0", "delays=-1"),
    ],
)
def test_what_is_no_action_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_schedule(text)


def test_a_file_that_deadlocks_is_found_by_the_validator():
    with pytest.raises(ValueError, match="deadlocks"):
        validate(read_schedule("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"))
