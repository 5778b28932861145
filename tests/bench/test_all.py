"""`pypar bench all`: one table, the same figures as JSON, and a picture of them; and the race of bench/train.py."""

import json

import pytest

from pypar.bench.figures import Figure, line
from pypar.bench.training import race
from pypar.bench.training.contenders import CONTENDERS, Workload
from pypar.cli import main


def test_operators_in_a_table_a_file_and_a_picture(tmp_path, capsys):
    files = {name: tmp_path / f"all.{name}" for name in ("json", "png")}
    arguments = ["--ops", "rms_norm", "bucket", "--json", str(files["json"]), "--picture", str(files["png"])]
    assert main(["bench", "all", "--only", "operators", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(files["json"].read_text())
    figures = report["figures"]
    assert printed[: len(report["machine"])] == report["machine"]
    assert {figure["bench"] for figure in figures} == {"rms_norm", "bucket"}
    calls = {(f["dtype"], f["call"]) for f in figures if f["bench"] == "rms_norm"}
    assert calls == {(t, c) for t in ("float32", "bfloat16") for c in ("forward", "forward and backward")}
    for figure in figures:
        assert figure["ratio"] == pytest.approx(figure["peer_seconds"] / figure["seconds"])
        assert figure["share"] > 0 and figure["limit"] == "copy"
        del figure["ratio"]
        assert line(Figure(**figure)) in printed
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_communication_is_measured_against_gloo(capsys):
    assert main(["bench", "all", "--only", "communication"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row.endswith(" gloo")]
    assert {row[0] for row in rows} == {"all_reduce", "reduce_scatter", "all_gather"} and len(rows) == 24


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_contender_trains_alike(precision):
    """Losses that differ are an AssertionError of the race itself."""
    results = race.race(list(CONTENDERS), Workload(precision), steps=1, rounds=1)
    for name, result in results.items():
        assert not result.failure or name == "torch.compile, one process", result.failure
        assert result.failure or (len(result.seconds) == 1 and result.peak_bytes > 1 << 27)


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    for arguments, sentence in (
        (["--ops", "atention"], "--ops: unknown operator 'atention', known are"),
        (
            ["--json", str(tmp_path)],
            f"--json ({tmp_path}) cannot be written; name a file in a folder that can",
        ),
        (["--picture", str(tmp_path / "no" / "a.png")], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "all", *arguments])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
