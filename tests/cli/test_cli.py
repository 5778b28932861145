"""The command `pypar`: what it refuses before any rank starts, how it launches, what it says of failures.

The long tests give every bad input to a process of its own, and continue a run, as tests/train/test_faults.py does too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pypar.cli import main
from pypar.train.config import load_config
from pypar.train.preflight import check
from tests.harness.small_run import assignments, set_arguments, small_run

# Put first on PYTHONPATH: every Python process that is a rank leaves a file, so a test sees if one started.
TELL_TALE = """
import os
if "RANK" in os.environ:
    open(os.path.join(os.path.dirname(__file__), "rank" + os.environ["RANK"]), "w").close()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, damaged input of several kinds and one finished run's checkpoint."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text("".join(f"line {i} is {i * i % 97}\n" for i in range(3000)))
    (place / "empty").mkdir()
    (place / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    (place / "bad.toml").write_text("[train\n")
    damaged = place / "runs" / "damaged" / "checkpoints" / "step_00000010"
    damaged.mkdir(parents=True)
    (damaged / "complete.json").write_text("{")
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(TELL_TALE)
    return place


def _sets(place: Path, **sets: object) -> list[str]:
    """Arguments of `pypar train` for a very small run."""
    return set_arguments(small_run(place, **sets))


def _path(place: Path) -> str:
    return os.pathsep.join([str(place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])


def _pypar(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pypar.cli", *arguments],
        env=os.environ | {"PYTHONPATH": _path(place)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


# name: (arguments of `pypar train` after the common ones, what the sentence must say)
BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "unknown axis": (["--mesh", "xp=2"], "names an unknown axis 'xp'"),
    "heads": (["--mesh", "tp=3"], "model.num_heads (4) must divide by the tp size (3); use 3 or 6"),
    "kv heads": (["--mesh", "tp=4"], "model.num_kv_heads (2) must divide by the tp size (4); use 4"),
    "vocabulary": (
        ["--mesh", "tp=2", "--set", "model.vocab_size=257"],
        "model.vocab_size (257) must divide by the tp size (2); use 256 or 258",
    ),
    "layers": (["--mesh", "pp=3"], "model.num_layers (2) must be at least the pp size (3)"),
    "heads of ulysses": (
        ["--mesh", "cp=4,tp=2", "--set", "context.method=ulysses"],
        "context.method 'ulysses' shares the 2 query heads of a rank between 4 cp ranks, which are more",
    ),
    "batch": (
        ["--mesh", "dp=3"],
        "train.batch_size (4) must divide by the dp size x train.microbatch_size (3)",
    ),
    "missing data": (["--data", "no/such/folder"], "data.path 'no/such/folder' does not exist"),
    "empty data": (["--data", "{place}/empty"], "it holds no file at all"),
    "bad line": (["--data", "{place}/bad.jsonl"], "bad.jsonl line 2 is not JSON"),
    "short data": (["--set", "train.sequence_length=100000"], "tokens but one sequence needs 100001"),
    "unknown key": (["--set", "optimizer.learning_rate=1"], "did you mean 'optimizer.lr'?"),
    "wrong type": (["--set", "train.steps=few"], "'train.steps' must be a whole number, not 'few'"),
    "schedule": (["--set", "pipeline.schedule=one_f_b"], "did you mean 'one_f_one_b'?"),
    "precision": (["--set", "train.precision=bf61"], "did you mean 'bf16'?"),
    "no TOML": (["{place}/bad.toml"], "bad.toml is not TOML"),
    "damaged checkpoint": (["--name", "damaged", "--resume"], "its complete.json is damaged"),
    "missing checkpoint": (["--set", "train.resume={place}/step_7"], "step_7 does not exist"),
}


ALONE = [pytest.param(name, True, marks=() if name == "kv heads" else pytest.mark.slow) for name in BAD_INPUT]


@pytest.mark.parametrize(("name", "process"), [*((name, False) for name in BAD_INPUT), *ALONE])
def test_bad_input_gets_one_sentence_and_exit_code_2(place: Path, monkeypatch, capfd, name, process) -> None:
    monkeypatch.setenv("PYTHONPATH", _path(place))
    more = [argument.replace("{place}", str(place)) for argument in BAD_INPUT[name][0]]
    arguments = ["train", *_sets(place), "--name", "refused", "--mesh", "dp=2", *more]
    if process:
        result = _pypar(place, *arguments)
        code, out, err = result.returncode, result.stdout, result.stderr
    else:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        code, (out, err) = ended.value.code, capfd.readouterr()
    assert err.count("\n") == 1 and err.startswith("pypar: ")
    assert BAD_INPUT[name][1] in err
    assert code == 2 and out == ""
    assert not list((place / "site").glob("rank*"))  # nothing was started
    assert not (place / "runs" / "refused" / "config.json").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mesh_that_does_not_fit_the_ranks_of_torchrun(place: Path, monkeypatch, capfd, rank: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, rank if "RANK" in name else "3")
    with pytest.raises(SystemExit) as ended:
        main(["train", *_sets(place), "--mesh", "tp=2"])
    said = capfd.readouterr().err
    assert ended.value.code == 2
    needs = "pypar: mesh tp=2 needs 2 ranks but 3 were started"
    assert said.startswith(needs) if rank == "0" else said == ""  # one rank a node speaks


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ({"optimizer__lr": 0}, "optimizer.lr (0.0) must be greater than 0"),
        ({"optimizer__beta2": 1}, "optimizer.beta2 (1.0) must be at least 0 and less than 1"),
        ({"optimizer__lr": "nan"}, "optimizer.lr (nan) must be a finite number"),
        ({"train__steps": 0}, "train.steps (0) must be at least 1"),
        (
            {"data__validation_fraction": 0},
            "data.validation_fraction (0.0) must be greater than 0 and less than 1",
        ),
        (
            {"context__layout": "zig"},
            "context.layout 'zig' is not one of zigzag, contiguous, striped; did you mean 'zigzag'?",
        ),
        ({"model__d_ff": 49, "mesh": "tp=2"}, "model.d_ff (49) must divide by the tp size (2); use 48 or 50"),
        ({"model__num_kv_heads": 3}, "num_heads (4) must divide by num_kv_heads (3)"),
        ({"mesh": "cp=3", "train__sequence_length": 2}, "(2) must be at least the cp size (3)"),
        (
            {"mesh": "cp=1000000"},
            "must be at least the cp size (1000000)",
        ),  # without counting each rank's positions
        ({"context__method": "rings"}, "context.method 'rings' is not one of ring, all_gather"),
        (
            {"mesh": "cp=4", "context__method": "hybrid", "context__ulysses_size": 3},
            "context.ulysses_size (3) must divide the cp size (4); use one of 1, 2, 4",
        ),
        (
            {"mesh": "cp=4", "context__method": "hybrid", "context__layout": "striped"},
            'context.method "hybrid" needs a layout of chunks',
        ),
        (
            {"mesh": "tp=2", "train__sequence_parallel": "true", "train__sequence_length": 31},
            "train.sequence_length (31) must divide by the tp size (2); use 30 or 32",
        ),
        (
            {
                "mesh": "tp=4,cp=2",
                "model__num_kv_heads": 4,
                "train__sequence_parallel": "true",
                "train__sequence_length": 36,
            },
            "use 32 or 40",
        ),
        ({"name": "''"}, "name must not be empty"),
        ({"directory": "{place}/text.txt"}, "cannot be written"),
        ({"data__tokenizer": "nothing.json"}, "tokenizer 'nothing.json' is neither 'bytes' nor a file"),
    ],
)
def test_checks(place: Path, sets: dict[str, object], sentence: str) -> None:
    sets = {key: str(value).replace("{place}", str(place)) for key, value in sets.items()}
    with pytest.raises(ValueError) as refused:
        check(load_config(None, assignments(small_run(place, **sets))))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_what_may_run_is_filled_in(place: Path) -> None:
    sets = assignments(small_run(place, mesh="pp=2", train__batch_size=1, name="planned"))
    plan = check(load_config(None, sets))
    assert plan.num_ranks == 2 and plan.config.mesh == "pp=2"
    assert any("2 stages with 1 microbatch a step leave each rank idle 50%" in note for note in plan.notes)
    assert check(load_config(None, [*sets, "mesh=''", "train.batch_size=4"]), 4).config.mesh == "dp=4"
    assert check(load_config(None, [*sets, "mesh=''"])).num_ranks == 1


def test_arguments_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["trian"],
        ["train", "--meshh", "tp=2"],
        ["generate"],
        ["schedule", "gpipe", "--ranks", "x"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_generate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        ([str(tmp_path / "no")], "no does not exist"),
        ([str(tmp_path)], "is not a complete checkpoint"),
        ([str(tmp_path), "--tokens", "0"], "--tokens (0) must be at least 1"),
        ([str(tmp_path), "--temperature", "-1"], "--temperature (-1.0) must be at least 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["generate", *arguments])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """A finished run of two ranks, which was told to write over another one."""
    run = place / "runs" / "two"
    old = run / "checkpoints" / "step_00000003"
    old.mkdir(parents=True)
    (old / "complete.json").write_text("{}")
    first = _pypar(place, "train", *_sets(place), "--name", "two", "--mesh", "tp=2", "--overwrite")
    assert first.returncode == 0, first.stderr
    assert len(list((place / "site").glob("rank*"))) == 2
    for file in (place / "site").glob("rank*"):
        file.unlink()
    return run


def test_train_two_ranks_then_generate_and_refuse_a_second_run(place: Path, two: Path, capfd) -> None:
    """Ranks are started, a run is written, sampled from, and not written over unasked."""
    train, run = ["train", *_sets(place), "--name", "two", "--mesh", "tp=2"], two
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000004"]
    assert json.loads((run / "config.json").read_text())["mesh"] == "tp=2"
    assert not (run / ".launch").exists()

    assert main(["generate", str(run), "--prompt", "line 3", "--tokens", "5", "--temperature", "0"]) == 0
    assert capfd.readouterr().out.startswith("line 3")

    for more, sentence in (
        ([], "holds an earlier run (its last checkpoint is step_00000004); continue it with --resume"),
        (["--resume"], "is at step 4 and train.steps is 4: nothing is left to train"),
        (
            ["--resume", "--set", "model.d_model=64"],
            "holds a model with d_model = 32 but the configuration says 64; set model.d_model=32",
        ),
    ):
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("sys.stderr.write", said.append)
            main([*train, *more])
        assert ended.value.code == 2 and sentence in "".join(said)


@pytest.mark.slow
def test_a_run_is_continued_and_written_over(place: Path, two: Path) -> None:
    train, run = ["train", *_sets(place), "--name", "two"], two
    longer = _pypar(place, *train, "--mesh", "pp=2", "--resume", "--set", "train.steps=6")
    assert longer.returncode == 0, longer.stderr
    assert "at step 4" in longer.stderr
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]

    again = _pypar(place, *train, "--overwrite", "--set", "train.steps=2")
    assert again.returncode == 0, again.stderr
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]
    for file in (place / "site").glob("rank*"):
        file.unlink()


def test_an_exception_in_a_rank_is_shown_once_with_its_rank(place: Path) -> None:
    sets = _sets(place, optimizer__lr=1e30, optimizer__warmup_steps=0, optimizer__clip_norm=0)
    result = _pypar(place, "train", *sets, "--name", "bursts", "--mesh", "dp=2")
    for file in (place / "site").glob("rank*"):
        file.unlink()
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("pypar: rank ") and "failed: RuntimeError: step" in last
    assert "no checkpoint had been written yet" in last
