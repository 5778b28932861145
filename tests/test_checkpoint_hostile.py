"""Damaged and hostile checkpoint folders: a sentence, soon, without a large allocation, and no code of theirs runs."""

import json
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pypar.cli import main
from pypar.layout import Layout
from pypar.mesh import Mesh
from pypar.train import checkpoint

RANK_0, INDEX = "rank_00000.safetensors", "index.json"
WEIGHTS = {"model.w": torch.arange(12.0).view(3, 4), "model.b": torch.arange(4.0), "count": torch.tensor(3)}


def _state() -> dict[str, tuple[torch.Tensor, Layout]]:
    return {name: (torch.zeros_like(w), Layout(tuple(w.shape))) for name, w in WEIGHTS.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {name: (w, Layout(tuple(w.shape))) for name, w in WEIGHTS.items()}
    return checkpoint.save(tmp_path_factory.mktemp("good"), 7, state, Mesh(), {"note": 1})


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / good.name))


def _agree(path: Path) -> None:
    """Make the manifest name the sizes that the files have: whoever forges a file can forge its size."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"] = {name: (path / name).stat().st_size for name in manifest["files"]}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def _json(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """What changes the JSON of one of the folder's files."""

    def damage(path: Path) -> None:
        value = json.loads((path / file).read_text())
        change(value)
        (path / file).write_text(json.dumps(value))

    return damage


def _header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """What changes the header of the tensors' file, whose bytes stay."""

    def damage(path: Path) -> None:
        whole = (path / RANK_0).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (path / RANK_0).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])

    return damage


def _box(**changes: Any) -> Callable[[Path], None]:
    return _json(INDEX, lambda v: v["tensors"]["model.w"]["boxes"][0].update(changes))


def _bytes(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(content) and None


def _link(path: Path) -> None:
    (path.parent / "outside").write_bytes((path / RANK_0).read_bytes())
    (path / RANK_0).unlink()
    (path / RANK_0).symlink_to("../outside")


def _pipe(path: Path) -> None:
    (path / INDEX).unlink()
    os.mkfifo(path / INDEX)


def _huge(path: Path) -> None:
    os.truncate(path / INDEX, 100 << 20)


TWO_BOXES = [{"offsets": [row, 0], "lengths": [2, 4], "file": RANK_0, "entry": "model.w"} for row in (0, 1)]
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "header of 10^12 bytes": (
        _bytes(RANK_0, (10**12).to_bytes(8, "little") + b"{}"),
        "claims 1,000,000,000,000 bytes",
    ),
    "empty file": (_bytes(RANK_0, b""), "it ends after 0 bytes"),
    "header is a list": (_bytes(RANK_0, (2).to_bytes(8, "little") + b"[]"), "no table of tensors"),
    "header nested deep": (
        _bytes(RANK_0, (100_000).to_bytes(8, "little") + b"[" * 100_000),
        f"{RANK_0} is damaged: it is nested too deeply",
    ),
    "entry of 10^12 elements": (
        _header(lambda h: h["model.w"].update(shape=[10**6, 10**6])),
        "48 bytes instead of 4,000,000,000,000",
    ),
    "entry past the end": (
        _header(lambda h: h["count"].update(data_offsets=[64, 72])),
        "overlap or leave a gap",
    ),
    "entries overlap": (
        _header(lambda h: h["model.b"].update(data_offsets=[0, 16])),
        "overlap or leave a gap",
    ),
    "entry is missing": (_header(lambda h: h.update(other=h.pop("model.w"))), "does not hold 'model.w'"),
    "entry of another dtype": (
        _header(lambda h: h["model.w"].update(dtype="I32")),
        "as I32 [3, 4], but the index",
    ),
    "dtype of none": (_header(lambda h: h["model.w"].update(dtype="PICKLE")), "a dtype that is not one of"),
    "negative size": (_header(lambda h: h["model.w"].update(shape=[-3, -4])), "a shape that is none"),
    "trailing bytes": (lambda p: (p / RANK_0).open("ab").write(b"x"), "take 72 bytes, but the file holds 73"),
    "box outside": (_box(offsets=[1, 0]), "is not inside the tensor's shape [3, 4]"),
    "box of 10^15": (_box(lengths=[10**15, 4]), "is not inside"),
    "box smaller": (_box(lengths=[2, 4]), "leave gaps"),
    "boxes overlap": (_json(INDEX, lambda v: v["tensors"]["model.w"].update(boxes=TWO_BOXES)), "overlap"),
    "tensor of 10^30": (
        _json(INDEX, lambda v: v["tensors"]["model.w"].update(shape=[10**15, 10**15])),
        "too large to be one",
    ),
    "64 dims": (_json(INDEX, lambda v: v["tensors"]["model.w"].update(shape=[1] * 64)), "corners, more than"),
    "file of another folder": (_box(file="../outside"), "which is no file of a rank"),
    "absolute file": (_box(file="/etc/passwd"), "which is no file of a rank"),
    "file that the manifest lacks": (
        _box(file="rank_00009.safetensors"),
        "does not name rank_00009.safetensors",
    ),
    "index of 100 MB": (_huge, "it has 104,857,600 bytes, more than the 33,554,432 that are read"),
    "index nested deep": (_bytes(INDEX, b'{"a":' * 10**5), "it is nested too deeply"),
    "index of brackets": (_bytes(INDEX, b"[" + b"[]," * 10**7), "lists and tables in"),
    "index of digits": (_bytes(INDEX, b"9" * 10**6), "it is not JSON"),
    "index of NaN": (_bytes(INDEX, b"NaN"), "NaN is no number of JSON"),
    "index of Latin-1": (_bytes(INDEX, b'"\xff"'), "it is not JSON"),
    "index of a later version": (
        _json(INDEX, lambda v: v.update(version=2)),
        "it is of version 2, and 1 is read",
    ),
    "index of something else": (_json(INDEX, lambda v: v.update(format="x")), 'does not say "format"'),
    "index is a pipe": (_pipe, "is missing"),
    "file is a link": (_link, f"{RANK_0} is missing"),
    "manifest names a path": (
        _json(checkpoint.MANIFEST, lambda v: v["files"].update({"../../x": 1})),
        "names '../../x', which is no file of a checkpoint",
    ),
    "manifest without a step": (_json(checkpoint.MANIFEST, lambda v: v.update(step="7")), "it has no step"),
    "manifest with a step of 10^30": (
        _json(checkpoint.MANIFEST, lambda v: v.update(step=10**30)),
        "its step is none",
    ),
    "manifest of 5 MB": (
        _bytes(checkpoint.MANIFEST, b" " * (5 << 20)),
        "more than the 4,194,304 that are read",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_gets_a_sentence(path: Path, name: str) -> None:
    damage, sentence = DAMAGES[name]
    damage(path)
    if not name.startswith("manifest") and not name.endswith(("a pipe", "a link")):
        _agree(path)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError) as refused:
        checkpoint.check_readable(path)
    assert sentence in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 600
    with pytest.raises(ValueError):  # not CheckpointException, which `except Exception` lets pass
        checkpoint.load(path, _state(), Mesh())
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("file", [INDEX, RANK_0, checkpoint.MANIFEST])
def test_flipped_bytes_are_refused_or_change_nothing_else(path: Path, file: str) -> None:
    """400 damages: flips of one to three bytes, cuts, insertions. Whatever passes the checks must load."""
    whole = (path / file).read_bytes()
    length = (
        8 + int.from_bytes(whole[:8], "little") if file == RANK_0 else len(whole)
    )  # the tensors have no checksum
    chosen = random.Random(file)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chosen.randint(1, 3)):
            at, kind = chosen.randrange(length - 30), chosen.randrange(4)  # cuts make it shorter
            if kind < 2:
                damaged[at] = chosen.randrange(256) if kind else damaged[at] ^ (1 << chosen.randrange(8))
            elif kind == 2:
                del damaged[at : at + chosen.randint(1, 8)]
            else:
                damaged[at:at] = chosen.choice(
                    [b"[", b"{", b"9", b'"', b"-", b"\0", b"../"]
                ) * chosen.randint(1, 40)
        (path / file).write_bytes(damaged)
        if file != checkpoint.MANIFEST:
            _agree(path)
        state = _state()
        try:
            checkpoint.check_readable(path)
            checkpoint.load(path, state, Mesh())
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        for name, weight in WEIGHTS.items():
            assert state[name][0].shape == weight.shape
    assert refused > 200


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
    sets = {
        "directory": place,
        "data.path": place / "text.txt",
        "data.cache_directory": place / "cache",
        "model.num_layers": 1,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.d_ff": 16,
        "train.steps": 2,
        "train.sequence_length": 16,
        "train.sample_tokens": 0,
        "train.evaluate_every": 0,
    }
    arguments = ["train", "--name", "a"]
    arguments += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    assert main(arguments) == 0
    return arguments


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
        _agree(hostile)
    longer = [
        "--set",
        "train.steps=3",
        "--set",
        f"train.resume={hostile}",
        "--set",
        f"directory={tmp_path / 'runs'}",
    ]
    for arguments in (["generate", str(hostile), "--tokens", "2"], [*run, *longer]):
        if where == ".metadata":  # beside a whole checkpoint: nobody looks at it
            assert main(arguments) == 0
            continue
        with pytest.raises(SystemExit) as ended:
            main(arguments)
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
        (lambda c: c["model"].update(d_model=1 << 40), "shape [256, 16] but the model has"),
        (lambda c: c["model"].update(num_kv_heads=0), "model.num_kv_heads (0) must be at least 1"),
        (lambda c: c["model"].update(d_ff="16"), "must be a whole number, not '16'"),
        (lambda c: c["data"].update(tokenizer="../gone.json"), "is neither 'bytes' nor a file"),
        (lambda c: c.clear(), "shape [256, 16] but the model has"),
    ],
)
def test_generate_makes_no_model_that_the_weights_do_not_fill(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change, sentence: str
) -> None:
    directory = Path(run[4].partition("=")[2]) / "a" / "checkpoints" / "step_00000002"
    hostile = Path(shutil.copytree(directory, tmp_path / "x"))
    _json(checkpoint.MANIFEST, lambda v: change(v["extra"]["config"]))(hostile)
    start = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(hostile)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("\n") == 1
    assert time.perf_counter() - start < 5
