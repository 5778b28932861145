"""`pypar schedule`: the picture, the list of all schedules, refusals."""

import json
from pathlib import Path

import pytest

from pypar.cli import main
from pypar.pipeline_parallel import schedules


def test_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "gpipe", "--ranks", "2", "--microbatches", "3"]) == 0
    drawn = capsys.readouterr().out
    assert "rank 0 |F0 F1 F2" in drawn and "bubble 25.00%" in drawn
    assert main(["schedule"]) == 0  # all of them, a line each
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == schedules.names()
    for arguments, sentence in (
        (["gpip"], "did you mean 'gpipe'?"),
        (["gpipe", "--ranks", "0"], "num_ranks (0)"),
        (["gpipe", "--option", "chunks=2"], "pipeline schedule gpipe has no option 'chunks'; it has none"),
        (["gpipe", "--option", "chunks"], "schedule option 'chunks' must be a name, = and a number"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["schedule", *arguments])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


COST = "F=18.522,I=18.086,W=9.337,comm=0.601"


def test_facts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The published bubble rates of 1F1B, ZB-H1 and ZB-H2 (arXiv 2401.10241, table 5), and ZB-2p within its memory."""
    for name, rate, memory in (
        ("one_f_one_b", 0.2431, 8),
        ("zb_h1", 0.1585, 8),
        ("zb_h2", 0.1083, 15),
        ("zb_2p", 0.0433, 16),
    ):
        assert main(["schedule", name, "--ranks", "8", "--microbatches", "24", "--cost", COST, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["legal"] and facts["name"] == name and facts["buffers"] <= 2
        assert round(facts["span_bubble_rate"], 4) == rate <= facts["makespan_bubble_rate"] + 1e-4
        assert facts["makespan"] >= facts["span"] > 24 * (18.522 + 18.086 + 9.337)
        assert len(facts["peak_in_flight"]) == 8 and max(facts["peak_memory"]) <= memory


def test_what_a_run_cannot_have_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "pipedream"]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith(
        "note: pipeline schedule pipedream updates weights while microbatches are in flight"
    )
    assert main(["schedule", "pipedream", "--json"]) == 0
    assert note.endswith(json.loads(capsys.readouterr().out)["refused"])
    assert main(["schedule", "zb_v", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["refused"]


def test_all_schedules_in_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "all.svg"
    assert main(["schedule", "--all", "--ranks", "3", "--microbatches", "4", "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == schedules.names()
    assert any(line.startswith("chimera") and "must be even" in line for line in lines)
    drawn = picture.read_text()
    assert "zb_v: makespan" in drawn and "chimera:" not in drawn
    assert main(["schedule", "--all", "--json"]) == 0
    assert [facts["name"] for facts in json.loads(capsys.readouterr().out)] == schedules.names()


def test_the_fastest_is_chosen_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "auto", "--ranks", "8", "--microbatches", "24", "--cost", COST, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["name"] == "zb_v" and told.err.startswith("zb_v is the fastest of 12")
    limits = ["--memory", "2.9", "--layers", "8"]
    assert main(["schedule", "auto", *limits]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("v_min is the fastest of 1 that fit") and "rank 3 |" in told.out


def test_lists_of_actions_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    assert main(["schedule", "zb_v", "--csv", str(path)]) == 0
    assert "bubble 0.00%" in capsys.readouterr().out
    assert main(["schedule", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["span_bubble_rate"] == 0
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    assert main(["schedule", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not facts["legal"] and "deadlocks: rank 0, position 1" in facts["fault"]
    assert "  rank 1 | F0 F1 B0 B1" in facts["fault"].splitlines()
    own_bytes = tmp_path / "bytes.csv"
    own_bytes.write_bytes(b"\xff\xfe")
    for arguments, sentence in (
        ([str(path)], "deadlocks"),
        ([str(tmp_path / "none.csv")], "there is no file"),
        (["gpipe", "--picture", "a.gif"], "ends in .svg or .png"),
        (["gpipe", "--cost", "X=1"], "cost 'X' is not one of F"),
        (["gpipe", "--cost", "F=1,F=2"], "cost 'F' is given twice"),
        (["gpipe", "--cost", "F=0,I=0,W=0"], "leave a forward or a backward no time"),
        (["zb_h1", "--cost", "B=1,I=0,W=0"], "leave a forward or a backward no time"),
        (["gpipe", "--cost", "F=1e308"], "must be a number from 0 to 1e+12"),
        (["gpipe", "--cost", "kept=5"], "is a share, which is at most 1"),
        (["gpipe", "--picture", str(tmp_path / "none" / "a.svg")], "its folder does not exist"),
        (["gpipe", "--csv", str(tmp_path)], "it is a folder"),
        (["gpipe", "--memory", "3"], 'gpipe does not go with --memory; leave --memory out, or name "auto"'),
        (["gpipe", "--memory", "nan"], "--memory (nan) must be at least 0"),
        (["auto", "--layers", "0"], "--layers (0) must be at least 1"),
        ([str(path), "--ranks", "2"], "a file of actions does not go with --ranks"),
        ([str(own_bytes), "--json"], "is no text"),
        (["interleaved", *["--option", "stages_per_rank=2"] * 2], "stages_per_rank is given twice"),
        (["--all", "--option", "a=1"], "--all does not go with --option"),
        (["--json"], "the list of all schedules does not go with --json"),
        (["auto", "--memory", "0.1"], "no pipeline schedule fits"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["schedule", *arguments])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_a_very_short_action_does_not_widen_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "zb_h1", "--ranks", "2", "--microbatches", "2", "--cost", "W=1e-9"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) < 20_000 and "F0" in rows[0]
