"""Going on under another configuration: no sample twice, what changed is said, what cannot go on is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pypar.cli import main
from pypar.mesh import Mesh
from pypar.train import checkpoint
from pypar.train.config import RunConfig, load_config
from pypar.train.data.windows import Batch
from pypar.train.trainer import Trainer
from tests.harness.small_run import assignments, set_arguments, small_run

LENGTH = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("changes")
    (place / "text.txt").write_text("".join(f"{i:08d}" for i in range(400)))  # every 8 characters differ
    (place / "other.txt").write_text("".join(f"{i:08d}" for i in range(1000, 1400)))
    return place


def _run(place: Path, **more: Any) -> dict[str, Any]:
    sizes = {"train__steps": 20, "train__batch_size": 8, "train__sequence_length": LENGTH} | more
    sizes = {"train__microbatch_size": sizes["train__batch_size"]} | sizes
    return small_run(place, train__sample_tokens=0, train__log_every=1000, **sizes)


def _trainer(place: Path, **more: Any) -> Trainer:
    return Trainer(load_config(None, assignments(_run(place, **more))), Mesh(), torch.device("cpu"))


def _windows(trainer: Trainer, num_steps: int) -> list[str]:
    """The text of each sample of the next steps."""
    seen: list[str] = []
    batch = trainer.data.train_batch

    def spy(first_sample: int, num_samples: int) -> Batch:
        samples = batch(first_sample, num_samples)
        seen.extend("".join(map(chr, row.tolist())) for row in samples.tokens)
        return samples

    trainer.data.train_batch = spy  # type: ignore[method-assign]
    for _ in range(num_steps):
        trainer.train_step()
    trainer.data.train_batch = batch  # type: ignore[method-assign]
    return seen


def _saved(place: Path, folder: Path, num_steps: int, **more: Any) -> Path:
    trainer = _trainer(place, **more)
    _windows(trainer, num_steps)
    return trainer.save(folder)


@pytest.mark.parametrize(("first", "second"), [(4, 8), (8, 4), (6, 5)])
def test_another_batch_size_repeats_no_sample(place: Path, tmp_path: Path, first: int, second: int) -> None:
    before = _trainer(place, train__batch_size=first)
    seen = _windows(before, 20)
    path = before.save(tmp_path)
    after = _trainer(place, train__batch_size=second, train__steps=40)
    lines = after.load(path)
    assert f"train.batch_size {first} -> {second} (the samples go on in their order)" in lines
    assert (after.step, after.samples) == (20, 20 * first)
    seen += _windows(after, 20)
    assert after.samples == 20 * (first + second)
    epoch = after.data.num_train_windows
    assert len(set(seen[:epoch])) == len(seen[:epoch])
    whole = _trainer(place, train__batch_size=len(seen))
    assert seen == _windows(whole, 1)
    again = _trainer(place, train__batch_size=second, train__steps=40)  # and a third part knows of both
    again.load(after.save(tmp_path))
    assert again.samples == 20 * (first + second)


def test_what_changed_is_said_in_a_line_each(place: Path, tmp_path: Path) -> None:
    path = _saved(place, tmp_path, 10, train__steps=40, optimizer__warmup_steps=5)
    assert _trainer(place, train__steps=40, optimizer__warmup_steps=5).load(path) == ()
    copy = tmp_path / "copy.txt"
    copy.write_bytes((place / "text.txt").read_bytes())
    os.utime(copy, (1, 1))
    changed = _trainer(
        place,
        train__steps=30,
        optimizer__warmup_steps=5,
        optimizer__lr=2e-3,
        optimizer__clip_norm=0.5,
        train__precision="bf16",
        train__keep_checkpoints=3,
        data__path=copy,
        mesh="dp=1",
    )
    assert changed.load(path) == (
        "mesh '' -> 'dp=1'",
        f"data.path '{place / 'text.txt'}' -> '{copy}' (the same tokens)",
        "optimizer.lr 0.003 -> 0.002 (from this step on; the moments are kept)",
        "optimizer.clip_norm 1.0 -> 0.5 (from this step on; the moments are kept)",
        "train.steps 40 -> 30 (the learning rate now falls until the new last step)",
        "train.precision 'fp32' -> 'bf16'",
        "train.keep_checkpoints 2 -> 3",
        "the learning rate of step 11 is 0.001828, not 0.002866",
    )


OTHER_DATA = {
    "sequence length": ({"train__sequence_length": 16}, "train.sequence_length was 8 and is 16"),
    "seed": ({"seed": 5}, "seed was 0 and is 5"),
    "text": ({"data__path": "other.txt"}, "the training text has other tokens"),
    "validation": ({"data__validation_fraction": 0.5}, "the training text had 3041 tokens and has 1601"),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_samples_are_refused_or_begin_anew(place: Path, tmp_path: Path, name: str) -> None:
    more, sentence = dict(OTHER_DATA[name][0]), OTHER_DATA[name][1]
    if "data__path" in more:
        more["data__path"] = place / more["data__path"]
    path = _saved(place, tmp_path, 3)
    refused = _trainer(place, **more)
    with pytest.raises(ValueError) as error:
        refused.load(path)
    assert f"has seen 24 samples of other data: {sentence}" in str(error.value)
    assert "set train.resume_data=restart" in str(error.value)
    assert refused.step == 0
    fresh = _trainer(place, train__resume_data="restart", **more)
    assert fresh.load(path)[-1].startswith("the data begins at its first sample: ")
    assert (fresh.step, fresh.samples) == (3, 0)
    first = _windows(fresh, 2)
    assert first == _windows(_trainer(place, **more), 2)
    later = _trainer(place, train__resume_data="restart", **more)  # the new data are its data now: it goes on
    later.load(fresh.save(tmp_path))
    assert (later.step, later.samples) == (5, 16)


def test_a_checkpoint_that_does_not_say_what_it_has_seen_is_refused(place: Path, tmp_path: Path) -> None:
    path = _saved(place, tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for samples in (None, -1, "8", 1.5, 10**30):
        manifest["extra"]["samples"] = samples
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="does not say which samples its run has seen"):
            _trainer(place).load(path)
    manifest["extra"] |= {
        "samples": 8,
        "config": {"train": {"steps": 10**400}, "optimizer": [1], "seed": {"x": []}},
    }
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert "train.steps 1000" in _trainer(place).load(path)[0]  # nonsense is said, at most a line of it


def test_the_command_says_what_changed_and_refuses_before_a_rank_starts(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--name", "a", *set_arguments(_run(place))]
    assert main(run) == 0
    capsys.readouterr()
    longer = [*run, "--resume", "--set", "train.steps=22"]
    with pytest.raises(SystemExit) as ended:
        main([*longer, "--set", "train.sequence_length=16"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "of other data: train.sequence_length was 8 and is 16" in said
    with pytest.raises(SystemExit) as ended:
        main([*longer, "--set", "train.resume_data=anew"])
    assert ended.value.code == 2 and "is not one of same, restart" in capsys.readouterr().err
    assert main([*longer, "--set", "train.batch_size=4", "--set", "train.microbatch_size=4"]) == 0
    said = capsys.readouterr().err
    assert "step_00000020 at step 20, after 160 samples\n" in said
    assert "resumed with train.batch_size 8 -> 4 (the samples go on in their order)\n" in said
    assert "resumed with train.steps 20 -> 22" in said and "seed" not in said
    newest = checkpoint.latest(RunConfig(name="a", directory=str(place / "runs")).checkpoint_directory)
    assert newest is not None and checkpoint.read_extra(newest)["samples"] == 168
