"""Where text comes from: files of a folder or glob, JSONL records, or Python's own library."""

import codecs
import collections
import fnmatch
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pypar.train.sections import DataConfig

PYTHON_STDLIB = "python-stdlib"
LEFT_OUT_OF_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Part of a document. ``learned``: whether its tokens count in the loss."""

    text: bytes
    learned: bool = True


@dataclass(frozen=True)
class SourceFile:
    """``name`` is the path relative to where the search began (posix), the same on every machine."""

    path: Path
    name: str
    size: int
    mtime_ns: int

    @property
    def is_jsonl(self) -> bool:
        return self.path.suffix == ".jsonl"

    def document_names(self) -> Iterator[str]:
        """A text file is one document, each line of a JSONL file that is not blank is one."""
        if not self.is_jsonl:
            yield self.name
            return
        with _open(self) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{self.name}:{number}"

    def documents(self) -> Iterator[tuple[str, Iterator[Piece]]]:
        """Where each document stands and its pieces, of about 1 MiB at most; in the order of ``document_names``."""
        if not self.is_jsonl:
            yield str(self.path), self._text_pieces()
            return
        with _open(self) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{self.path} line {number}"
                    yield where, iter(_record_pieces(line, where))

    def _text_pieces(self) -> Iterator[Piece]:
        """Cut after a line end where there is one, never inside a character."""
        with _open(self) as file:
            rest = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
            while chunk := file.read(PIECE_BYTES):
                chunk = rest + chunk
                cut = chunk.rfind(b"\n") + 1 or _character_end(chunk)
                rest = chunk[cut:]
                yield Piece(chunk[:cut])
            if rest:
                yield Piece(rest)


def _open(file: SourceFile) -> BinaryIO:
    try:
        return file.path.open("rb")
    except OSError as error:
        raise ValueError(
            f"{file.path} cannot be read: {error.strerror}; leave it out with data.pattern"
        ) from error


def _character_end(chunk: bytes) -> int:
    """Length of ``chunk`` without a UTF-8 character that its end cuts short."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(chunk[-4:])
    return len(chunk) - len(decoder.getstate()[0])


def _record_pieces(line: bytes, where: str) -> list[Piece]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(record, dict) and "messages" in record and not record.keys() & {"text", "prompt"}:
        raise ValueError(
            f'{where} holds "messages", and pypar does not render chat templates: write what the tokenizer\'s own '
            'template makes of them as {"text": ...} or {"prompt": ..., "response": ...} and set '
            "data.special_tokens=parse"
        )
    fields = ("prompt", "response") if isinstance(record, dict) and "text" not in record else ("text",)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in fields):
        held = record if isinstance(record, dict) else {}
        has = ", ".join(f"{name} ({type(value).__name__})" for name, value in held.items())
        raise ValueError(
            f'{where} must be {{"text": ...}} or {{"prompt": ..., "response": ...}}, each text, not: '
            f"{has or type(record).__name__}"
        )
    return [Piece(record[name].encode("utf-8", "surrogatepass"), name != "prompt") for name in fields]


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def find_files(data: DataConfig) -> list[SourceFile]:
    """The files of ``data.path`` that hold anything, sorted by name; ValueError where there is none."""
    if data.path == PYTHON_STDLIB:
        root = stdlib_folder()
        paths = [
            p for p in root.rglob("*.py") if not LEFT_OUT_OF_STDLIB.intersection(p.relative_to(root).parts)
        ]
    elif Path(data.path).is_dir():
        root = Path(data.path)
        visible = [p for p in root.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(root))]
        paths = [p for p in visible if fnmatch.fnmatch(p.name, data.pattern)]
        if not paths:
            kinds = collections.Counter(p.suffix or p.name for p in visible).most_common(4)
            holds = ", ".join(f"{count} {kind}" for kind, count in kinds) or "no file at all"
            raise ValueError(
                f"no file in data.path {data.path!r} matches data.pattern {data.pattern!r} (it holds {holds})"
                "; set data.pattern"
            )
    elif Path(data.path).is_file():
        root, paths = Path(data.path).parent, [Path(data.path)]
    elif glob.has_magic(data.path):
        paths = [p for p in map(Path, glob.glob(data.path, recursive=True)) if p.is_file()]
        root = Path(os.path.dirname(data.path[: next(i for i, c in enumerate(data.path) if c in "*?[")]))
        if not paths:
            raise ValueError(
                f"no file matches data.path {data.path!r}; give a folder, a glob, a text or a .jsonl file"
            )
    else:
        raise ValueError(
            f"data.path {data.path!r} does not exist; give a folder, a glob, a text file, a .jsonl file or "
            f"{PYTHON_STDLIB!r}"
        )
    files = sorted((_stat(path, root) for path in paths), key=lambda f: f.name)
    files = [f for f in files if f.size]
    if not files:
        raise ValueError(f"data.path {data.path!r} holds only empty files; give it some text")
    return files


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _stat(path: Path, root: Path) -> SourceFile:
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; leave it out with data.pattern"
        ) from error
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return SourceFile(path, name, stat.st_size, stat.st_mtime_ns)
