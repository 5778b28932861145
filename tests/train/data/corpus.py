"""A folder of small texts, and the configuration that reads it."""

from pathlib import Path

from pypar.train.config import DataConfig


def config_of(tmp_path: Path, path: Path | str, **more: object) -> DataConfig:
    return DataConfig(path=str(path), cache_directory=str(tmp_path / "cache"), **more)  # type: ignore[arg-type]


def folder_of_texts(tmp_path: Path, count: int = 40) -> Path:
    folder = tmp_path / "texts"
    for i in range(count):
        file = folder / f"part{i % 3}" / f"{i:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {i} says {i * i}\n" * 5)
    return folder
