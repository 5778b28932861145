"""No command runs code of a checkpoint, or makes a model that its weights do not fill."""

import os
import pickle
import shutil
import time
from pathlib import Path

import pytest

from pypar.cli import main
from pypar.train import checkpoint
from tests.harness.small_run import set_arguments, small_run
from tests.train.checkpoint.forged import INDEX, RANK_0, agree, change_json


class _Runs:
    """Unpickled, it makes a folder: code has run."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.place,)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of `pypar train` for a small run that is there already, of two steps."""
    place = tmp_path_factory.mktemp("run")
    (place / "text.txt").write_text("".join(f"line {i} is {i * i % 97}\n" for i in range(500)))
    command = [
        "train",
        "--name",
        "a",
        *set_arguments(small_run(place, train__steps=2, train__sample_tokens=0)),
    ]
    assert main(command) == 0
    return command


@pytest.mark.parametrize("where", [".metadata", "alone", INDEX, RANK_0, checkpoint.MANIFEST])
def test_no_command_runs_code_of_a_checkpoint(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """A pickle in the place of each file; "alone": as pypar and torch wrote checkpoints before."""
    directory = Path(run[4].partition("=")[2]) / "a" / "checkpoints" / "step_00000002"
    hostile = tmp_path / "step_00000002"
    shutil.copytree(directory, hostile)
    pickled = pickle.dumps(_Runs(tmp_path / "ran"))
    (hostile / (".metadata" if where == "alone" else where)).write_bytes(pickled)
    if where == "alone":
        (hostile / INDEX).unlink()
    if where in (INDEX, RANK_0):
        agree(hostile)
    longer = [
        "--set",
        "train.steps=3",
        "--set",
        f"train.resume={hostile}",
        "--set",
        f"directory={tmp_path / 'runs'}",
    ]
    for command in (["generate", str(hostile), "--tokens", "2"], [*run, *longer]):
        if where == ".metadata":  # beside a whole checkpoint: nobody looks at it
            assert main(command) == 0
            continue
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("pypar: ") and said.count("\n") == 1
        assert where != "alone" or "is of an earlier format, whose .metadata is a pickle" in said
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickled)
    assert (tmp_path / "ran").exists()  # the pickle would have


def test_a_run_with_a_checkpoint_of_before_is_not_written_over(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "a" / "checkpoints" / "step_00000002"
    old.mkdir(parents=True)
    (old / ".metadata").write_bytes(b"x")
    for more, sentence in (
        ([], "holds an earlier run (checkpoint"),
        (["--resume"], "is of an earlier format"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*run, "--set", f"directory={tmp_path}", *more])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert (old / ".metadata").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["model"].update(num_layers=10**9), "weights but the model of the configuration has"),
        (lambda c: c["model"].update(d_model=1 << 40), "shape [256, 32] but the model has"),
        (lambda c: c["model"].update(num_kv_heads=0), "model.num_kv_heads (0) must be at least 1"),
        (lambda c: c["model"].update(d_ff="16"), "must be a whole number, not '16'"),
        (lambda c: c["data"].update(tokenizer="../gone.json"), "is neither 'bytes' nor a file"),
        (lambda c: c.clear(), "shape [256, 32] but the model has"),
    ],
)
def test_generate_makes_no_model_that_the_weights_do_not_fill(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change, sentence: str
) -> None:
    directory = Path(run[4].partition("=")[2]) / "a" / "checkpoints" / "step_00000002"
    hostile = Path(shutil.copytree(directory, tmp_path / "x"))
    change_json(checkpoint.MANIFEST, lambda v: change(v["extra"]["config"]))(hostile)
    start = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(hostile)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("\n") == 1
    assert time.perf_counter() - start < 5


def test_a_checkpoint_from_before_a_section_was_renamed_is_read(
    run: list[str], tmp_path: Path, capsys
) -> None:
    directory = Path(run[4].partition("=")[2]) / "a" / "checkpoints" / "step_00000002"
    older = Path(shutil.copytree(directory, tmp_path / "x"))

    def as_before(manifest):
        config = manifest["extra"]["config"]
        del config["memory"], config["recompute"], config["loss_scale"]
        config["store"] = {"name": "replicated"}

    change_json(checkpoint.MANIFEST, as_before)(older)
    assert main(["generate", str(older), "--tokens", "1"]) == 0
    assert capsys.readouterr().out
