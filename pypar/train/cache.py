"""The token cache: a source tokenised once into files that are memory-mapped.

One folder a source and tokenizer, ``<source>-<content>``: ``train.tokens``, ``validation.tokens`` (uint8,
uint16 or uint32, whichever holds the vocabulary), for JSONL also ``train.learned``, ``validation.learned``
(one byte a token), and ``meta.json``. It is written beside its final name and renamed when complete, so
whoever finds it finds all of it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from pypar.paths import cache_folder
from pypar.train.config import DataConfig
from pypar.train.sources import PYTHON_STDLIB, Piece, SourceFile, find_files, stdlib_folder
from pypar.train.tokens import ByteTokenizer, Tokenizer

FORMAT = 1
PARTS = ("train", "validation")
SHOW_PROGRESS_BYTES = 32 << 20
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class PartSize:
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class TokenCache:
    """A complete cache folder."""

    path: Path
    dtype: str
    has_mask: bool
    sizes: dict[str, PartSize]

    def tokens(self, part: str) -> np.ndarray:
        """Memory-mapped tokens of ``part`` ("train", "validation"): documents in order, each with its end."""
        return _mapped(self.path / f"{part}.tokens", self.dtype)

    def learned(self, part: str) -> np.ndarray | None:
        """Memory-mapped, 1 where the token counts in the loss; None where all do."""
        return _mapped(self.path / f"{part}.learned", "uint8") if self.has_mask else None


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def prepare_cache(data: DataConfig, tokenizer: Tokenizer) -> TokenCache:
    """The cache of ``data``, built now unless it is there and its input (names, sizes, times) unchanged."""
    files = find_files(data)
    where = str(stdlib_folder()) if data.path == PYTHON_STDLIB else os.path.abspath(data.path)
    source = _digest([FORMAT, where, data.pattern, tokenizer.fingerprint, data.validation_fraction])
    content = _digest([source, *((f.name, f.size, f.mtime_ns) for f in files)])
    root = Path(data.cache_directory).expanduser() if data.cache_directory else cache_folder()
    path = root / f"{source}-{content}"
    found = _open(path)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{source}.lock"):
            found = _open(path)  # another process may have built it while this one waited
            if found is None:
                _build(path, files, data, tokenizer)
                found = _open(path)
    except OSError as error:
        raise ValueError(
            f"the token cache {root} cannot be written: {error}; set data.cache_directory"
        ) from error
    if found is None:
        raise RuntimeError(f"the token cache {path} was built but cannot be read; delete it")
    for old in root.glob(f"{source}-*"):  # of input that has changed since
        with contextlib.suppress(OSError):
            if (
                old != path and time.time() - old.stat().st_mtime > STALE_SECONDS
            ):  # another job may read a newer one
                shutil.rmtree(old)
    return found


def _digest(parts: Iterable[object]) -> str:
    return hashlib.blake2b(json.dumps(list(parts)).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the lock goes with its holder's process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path) -> TokenCache | None:
    """The cache at ``path`` if it is complete."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        sizes = {part: PartSize(**meta["sizes"][part]) for part in PARTS}
        cache = TokenCache(path, meta["dtype"], meta["has_mask"], sizes)
        whole = all(len(cache.tokens(part)) == sizes[part].tokens for part in PARTS)
        return cache if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _validation_flags(names: Iterable[str], fraction: float) -> np.ndarray:
    """bool [documents]: chosen by a hash of the name, so adding a document moves no other.

    Each side gets at least one document; a single one is not flagged: it is split by position.
    """
    hashes = np.fromiter(
        (
            int.from_bytes(
                hashlib.blake2b(n.encode("utf-8", "surrogateescape"), digest_size=7).digest(), "little"
            )
            for n in names
        ),
        np.float64,
    ) / float(1 << 56)
    flags = hashes < fraction
    if len(flags) > 1 and not flags.any():
        flags[hashes.argmin()] = True
    elif len(flags) > 1 and flags.all():
        flags[hashes.argmax()] = False
    return flags if len(flags) > 1 else np.zeros(len(flags), bool)


class _PartWriter:
    """Appends one part's tokens (and which of them are learned) to files in ``folder``."""

    def __init__(
        self, folder: Path, part: str, tokenizer: Tokenizer, dtype: np.dtype, has_mask: bool
    ) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.file: BinaryIO = (folder / f"{part}.tokens").open("wb")
        self.mask: BinaryIO | None = (folder / f"{part}.learned").open("wb") if has_mask else None
        self.num_tokens = self.text_bytes = 0

    def document(self, pieces: Iterable[Piece], name: str) -> int:
        """Write a document and its end token; returns its bytes. One without text is left out."""
        size = 0
        for piece in pieces:
            if piece.text:
                self._append(self._encode(piece.text, name), piece.learned)
                size += len(piece.text)
        if size:
            self._append(np.array([self.tokenizer.end_token], self.dtype), True)
        self.text_bytes += size
        return size

    def _encode(self, text: bytes, name: str) -> np.ndarray:
        if isinstance(self.tokenizer, ByteTokenizer):
            nul = text.find(b"\0")
            if nul >= 0:
                raise ValueError(
                    f"{name} is not text: it holds a NUL byte, which byte tokens keep for the end of a "
                    "document; leave it out with data.pattern"
                )
            return np.frombuffer(text, np.uint8)
        return np.array(self.tokenizer.encode(text.decode("utf-8", errors="replace")), self.dtype)

    def _append(self, tokens: np.ndarray, learned: bool) -> None:
        self.file.write(tokens.tobytes())
        if self.mask is not None:
            self.mask.write(np.full(len(tokens), learned, np.uint8).tobytes())
        self.num_tokens += len(tokens)

    def move_tail(self, num_tokens: int, to: "_PartWriter") -> None:
        """The last ``num_tokens`` become the (empty) other part's."""
        kept, share = self.num_tokens - num_tokens, num_tokens / max(1, self.num_tokens)
        for mine, other, width in ((self.file, to.file, self.dtype.itemsize), (self.mask, to.mask, 1)):
            if mine is not None and other is not None:
                mine.flush()
                with open(mine.name, "rb") as reader:
                    reader.seek(kept * width)
                    shutil.copyfileobj(reader, other)
                mine.truncate(kept * width)
        to.num_tokens, to.text_bytes = num_tokens, round(self.text_bytes * share)
        self.num_tokens, self.text_bytes = kept, self.text_bytes - to.text_bytes

    def close(self) -> None:
        for file in (self.file, self.mask):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()


def _build(path: Path, files: list[SourceFile], data: DataConfig, tokenizer: Tokenizer) -> None:
    """Tokenise ``files`` into ``path``, document by document; at most a few MiB of text are in memory."""
    shutil.rmtree(path, ignore_errors=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write(partial, files, data, tokenizer)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, files: list[SourceFile], data: DataConfig, tokenizer: Tokenizer) -> None:
    dtype = np.dtype(
        next(t for t in (np.uint8, np.uint16, np.uint32) if tokenizer.vocab_size <= np.iinfo(t).max + 1)
    )
    flags = _validation_flags((n for f in files for n in f.document_names()), data.validation_fraction)
    has_mask = any(f.is_jsonl for f in files)
    writers = {part: _PartWriter(folder, part, tokenizer, dtype, has_mask) for part in PARTS}
    total = sum(f.size for f in files)
    index = 0
    quiet = total < SHOW_PROGRESS_BYTES or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=quiet) as bar:
        for file in files:
            for pieces in file.documents():
                writer = writers["validation" if index < len(flags) and flags[index] else "train"]
                index += 1
                bar.update(writer.document(pieces, str(file.path)))
    if len(flags) == 1:
        train = writers["train"]
        train.move_tail(int(train.num_tokens * data.validation_fraction), writers["validation"])
    for writer in writers.values():
        writer.close()
    sizes = {part: dataclasses.asdict(PartSize(w.num_tokens, w.text_bytes)) for part, w in writers.items()}
    (folder / "meta.json").write_text(
        json.dumps({"dtype": dtype.name, "has_mask": has_mask, "sizes": sizes}) + "\n"
    )
