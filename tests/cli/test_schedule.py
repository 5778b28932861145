"""`pypar schedule`: the picture, the list of all schedules, refusals."""

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
