"""The token cache: a source tokenised once into files that are memory-mapped.

One folder a source and tokenizer, ``<source>-<content>``: ``train.tokens``, ``validation.tokens`` (uint8,
uint16 or uint32, whichever holds the vocabulary), ``train.ends``, ``validation.ends`` (int64, how many tokens there
are up to each document's end), for JSONL also ``train.learned``, ``validation.learned`` (one byte a token), and
``meta.json``. It is written beside its final name and renamed when complete, so whoever finds it finds all of it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pypar.files.cache import cache_folder
from pypar.files.json import read_json
from pypar.train.data.sources import PYTHON_STDLIB, SourceFile, find_files, stdlib_folder
from pypar.train.data.tokenise import DTYPES, PARTS, tokenise
from pypar.train.data.tokens import Tokenizer
from pypar.train.sections import DataConfig

FORMAT = 2  # of the folder; one of another format is not found, and is built anew
MOST_META_BYTES = 1 << 20
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class PartSize:
    tokens: int
    text_bytes: int
    documents: int


@dataclass(frozen=True)
class TokenCache:
    """A complete cache folder. notes: what of the text became other tokens than its writer may think."""

    path: Path
    dtype: str
    has_mask: bool
    sizes: dict[str, PartSize]
    notes: tuple[str, ...]

    def tokens(self, part: str) -> np.ndarray:
        """Memory-mapped tokens of ``part`` ("train", "validation"): documents in order, each with its end."""
        return _mapped(self.path / f"{part}.tokens", self.dtype)

    def ends(self, part: str) -> np.ndarray:
        """Memory-mapped int64 [documents], ascending: one past each document's last token; the last is all tokens."""
        return _mapped(self.path / f"{part}.ends", "int64")

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
    source = _digest([where, data.pattern, tokenizer.fingerprint, data.validation_fraction])
    content = _digest([FORMAT, source, *((f.name, f.size, f.mtime_ns) for f in files)])
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
        meta = read_json(path / "meta.json", MOST_META_BYTES)
        if meta["dtype"] not in DTYPES or type(meta["has_mask"]) is not bool:
            return None
        if type(meta["notes"]) is not list or not all(type(note) is str for note in meta["notes"]):
            return None
        sizes = {part: PartSize(**meta["sizes"][part]) for part in PARTS}
        cache = TokenCache(path, meta["dtype"], meta["has_mask"], sizes, tuple(meta["notes"]))
        return cache if all(_is_whole(cache, part) for part in PARTS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(cache: TokenCache, part: str) -> bool:
    size, ends, learned = cache.sizes[part], cache.ends(part), cache.learned(part)
    lengths = [len(cache.tokens(part)), ends[-1] if len(ends) else 0]
    lengths += [] if learned is None else [len(learned)]
    return len(ends) == size.documents and all(length == size.tokens for length in lengths)


def _build(path: Path, files: list[SourceFile], data: DataConfig, tokenizer: Tokenizer) -> None:
    """Tokenise ``files`` into ``path``, document by document; at most a few MiB of text are in memory."""
    shutil.rmtree(path, ignore_errors=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        meta = tokenise(partial, files, data.validation_fraction, tokenizer)
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
