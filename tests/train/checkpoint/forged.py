"""Changing files of a checkpoint as somebody with a text editor, or with bad intentions, could."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pypar.train import checkpoint

RANK_0, INDEX = "rank_00000.safetensors", "index.json"


def agree(path: Path) -> None:
    """Make the manifest name the sizes that the files have: whoever forges a file can forge its size."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"] = {name: (path / name).stat().st_size for name in manifest["files"]}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def change_json(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """What changes the JSON of one of the folder's files."""

    def damage(path: Path) -> None:
        value = json.loads((path / file).read_text())
        change(value)
        (path / file).write_text(json.dumps(value))

    return damage
