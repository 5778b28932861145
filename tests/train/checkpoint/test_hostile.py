"""Damaged and forged checkpoint folders get a sentence, soon and without a large allocation."""

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pypar.layout import Layout
from pypar.mesh import Mesh
from pypar.train import checkpoint
from tests.train.checkpoint.forged import INDEX, RANK_0, agree, change_json

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
    return change_json(INDEX, lambda v: v["tensors"]["model.w"]["boxes"][0].update(changes))


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
    "boxes overlap": (
        change_json(INDEX, lambda v: v["tensors"]["model.w"].update(boxes=TWO_BOXES)),
        "overlap",
    ),
    "tensor of 10^30": (
        change_json(INDEX, lambda v: v["tensors"]["model.w"].update(shape=[10**15, 10**15])),
        "too large to be one",
    ),
    "64 dims": (
        change_json(INDEX, lambda v: v["tensors"]["model.w"].update(shape=[1] * 64)),
        "corners, more than",
    ),
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
        change_json(INDEX, lambda v: v.update(version=2)),
        "it is of version 2, and 1 is read",
    ),
    "index of something else": (change_json(INDEX, lambda v: v.update(format="x")), 'does not say "format"'),
    "index is a pipe": (_pipe, "is missing"),
    "file is a link": (_link, f"{RANK_0} is missing"),
    "manifest names a path": (
        change_json(checkpoint.MANIFEST, lambda v: v["files"].update({"../../x": 1})),
        "names '../../x', which is no file of a checkpoint",
    ),
    "manifest without a step": (
        change_json(checkpoint.MANIFEST, lambda v: v.update(step="7")),
        "it has no step",
    ),
    "manifest with a step of 10^30": (
        change_json(checkpoint.MANIFEST, lambda v: v.update(step=10**30)),
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
        agree(path)
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
            agree(path)
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
