"""The token cache: when it is built, when it is taken, and what is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pypar.train.config import DataConfig
from pypar.train.data import cache
from pypar.train.data.tokens import ByteTokenizer
from tests.train.data.corpus import config_of, folder_of_texts


def test_cache_is_reused_and_rebuilt_when_the_input_changes(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path)
    config = config_of(tmp_path, folder)
    first = cache.prepare_cache(config, ByteTokenizer())
    stamp = (first.path / "meta.json").stat().st_mtime_ns
    assert cache.prepare_cache(config, ByteTokenizer()).path == first.path
    assert (first.path / "meta.json").stat().st_mtime_ns == stamp
    file = folder / "part0" / "00.txt"
    file.write_text("changed\n")
    second = cache.prepare_cache(config, ByteTokenizer())
    assert second.path != first.path and first.path.exists()  # another run may be reading it
    os.utime(first.path, (0, 0))
    file.write_text("changed once more\n")
    third = cache.prepare_cache(config, ByteTokenizer())
    assert not first.path.exists() and second.path.exists() and third.path.exists()
    assert b"changed" in second.tokens("train").tobytes() + second.tokens("validation").tobytes()
    os.utime(file, ns=(1, 1))
    assert cache.prepare_cache(config, ByteTokenizer()).path != second.path


def test_a_damaged_cache_is_built_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, folder_of_texts(tmp_path))
    built = cache.prepare_cache(config, ByteTokenizer())
    whole = (built.path / "train.tokens").read_bytes()
    (built.path / "train.tokens").write_bytes(whole[:-5])
    assert cache.prepare_cache(config, ByteTokenizer()).tokens("train").tobytes() == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.ends", b""),
        ("train.ends", b"\1" * 8),
        ("meta.json", b"[]"),
        ("meta.json", b'{"dtype": "O", "has_mask": false, "sizes": {}, "notes": []}'),
        ("meta.json", b'{"dtype": "uint8", "has_mask": false, "sizes": {}}'),
    ],
)
def test_a_cache_that_is_none_is_built_again(tmp_path: Path, name: str, content: bytes) -> None:
    config = config_of(tmp_path, folder_of_texts(tmp_path))
    built = cache.prepare_cache(config, ByteTokenizer())
    whole = (built.path / name).read_bytes()
    (built.path / name).write_bytes(content)
    assert cache.prepare_cache(config, ByteTokenizer()) == built
    assert (built.path / name).read_bytes() == whole


def test_a_cache_of_another_format_is_built_again_and_the_old_one_deleted(
    tmp_path: Path, monkeypatch
) -> None:
    config = config_of(tmp_path, folder_of_texts(tmp_path))
    monkeypatch.setattr(cache, "FORMAT", 1)
    old = cache.prepare_cache(config, ByteTokenizer())
    os.utime(old.path, (0, 0))
    monkeypatch.undo()
    assert cache.prepare_cache(config, ByteTokenizer()).path != old.path and not old.path.exists()


def test_processes_that_build_at_once_share_one_cache(tmp_path: Path) -> None:
    config = config_of(tmp_path, folder_of_texts(tmp_path))
    program = (
        "import sys; from pypar.train.config import DataConfig; from pypar.train.data.cache import prepare_cache;"
        "from pypar.train.data.tokens import ByteTokenizer;"
        "config = DataConfig(path=sys.argv[1], cache_directory=sys.argv[2]);"
        "print(prepare_cache(config, ByteTokenizer()).path)"
    )
    command = [sys.executable, "-c", program, config.path, config.cache_directory]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {builder.communicate(timeout=60)[0] for builder in builders}
    assert len(paths) == 1 and Path(paths.pop().strip()).is_dir()
    assert not list(Path(config.cache_directory).glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = DataConfig(path=str(folder_of_texts(tmp_path)), cache_directory=str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set data.cache_directory"):
        cache.prepare_cache(config, ByteTokenizer())
