"""Tokenising: documents into the files of a token cache, which ``TokenCache`` describes."""

import hashlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from pypar.train.data.sources import Piece, SourceFile
from pypar.train.data.tokens import ByteTokenizer, Tokenizer

PARTS = ("train", "validation")
DTYPES = ("uint8", "uint16", "uint32")  # of tokens: the first that holds the vocabulary
SHOW_PROGRESS_BYTES = 32 << 20


def tokenise(
    folder: Path, files: list[SourceFile], validation_fraction: float, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write both parts into ``folder``, document by document; returns what describes them, for its ``meta.json``.

    At most a few MiB of text are in memory.
    """
    dtype = np.dtype(next(name for name in DTYPES if tokenizer.vocab_size <= np.iinfo(name).max + 1))
    flags = _validation_flags((n for f in files for n in f.document_names()), validation_fraction)
    has_mask = any(f.is_jsonl for f in files)
    encoder = _Encoder(tokenizer)
    writers = {part: _PartWriter(folder, part, encoder, dtype, has_mask) for part in PARTS}
    total = sum(f.size for f in files)
    index = 0
    quiet = total < SHOW_PROGRESS_BYTES or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=quiet) as bar:
        for file in files:
            for where, pieces in file.documents():
                writer = writers["validation" if index < len(flags) and flags[index] else "train"]
                index += 1
                bar.update(writer.document(pieces, where))
    if len(flags) == 1:
        train = writers["train"]
        train.move_tail(int(train.num_tokens * validation_fraction), writers["validation"])
    for writer in writers.values():
        writer.close()
    sizes = {
        part: {"tokens": w.num_tokens, "text_bytes": w.text_bytes, "documents": w.num_documents}
        for part, w in writers.items()
    }
    return {"dtype": dtype.name, "has_mask": has_mask, "sizes": sizes, "notes": encoder.notes()}


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


class _Encoder:
    """Turns text into tokens, and remembers what of it became others than its writer may think."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        longest_first = sorted(tokenizer.text_names, key=len, reverse=True)
        self.names = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.named: Counter[str] = Counter()
        self.not_utf8, self.first_not_utf8, self.last_not_utf8 = 0, "", ""  # documents

    def encode(self, text: bytes, where: str, *, continued: bool) -> np.ndarray | list[int]:
        """where: which document it is; continued: another piece of the document precedes."""
        if isinstance(self.tokenizer, ByteTokenizer):
            if b"\0" in text:
                raise ValueError(
                    f"{where} is not text: it holds a NUL byte, which byte tokens keep for the end of a "
                    "document; leave it out with data.pattern"
                )
            return np.frombuffer(text, np.uint8)
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError:
            decoded = text.decode("utf-8", errors="replace")
            self.not_utf8 += where != self.last_not_utf8
            self.first_not_utf8, self.last_not_utf8 = self.first_not_utf8 or where, where
        if self.names is not None:
            self.named.update(self.names.findall(decoded))
        return self.tokenizer.encode(decoded, continued=continued)

    def notes(self) -> list[str]:
        """A sentence for each kind."""
        notes = []
        if self.named:
            names = ", ".join(f"{name} ({count} times)" for name, count in self.named.most_common(4))
            notes.append(
                f"the text names special tokens of the tokenizer, {names}, and they are text like any other; where "
                "a chat template wrote them, set data.special_tokens=parse"
            )
        if self.not_utf8:
            notes.append(
                f"documents that are not UTF-8: {self.not_utf8}, the first {self.first_not_utf8}; what could not be "
                "decoded became U+FFFD: convert them, or leave them out with data.pattern"
            )
        return notes


class _PartWriter:
    """Appends one part's tokens, their documents' ends and which of them are learned to files in ``folder``."""

    def __init__(self, folder: Path, part: str, encoder: _Encoder, dtype: np.dtype, has_mask: bool) -> None:
        self.encoder, self.dtype = encoder, dtype
        self.file: BinaryIO = (folder / f"{part}.tokens").open("wb")
        self.ends: BinaryIO = (folder / f"{part}.ends").open("wb")
        self.mask: BinaryIO | None = (folder / f"{part}.learned").open("wb") if has_mask else None
        self.num_tokens = self.num_documents = self.text_bytes = 0

    def document(self, pieces: Iterable[Piece], where: str) -> int:
        """Write a document and its end token; returns its bytes. One without tokens is left out.

        One that ends with the end token, as parsed text may, gets no second one.
        """
        size, last, end_token = 0, None, self.encoder.tokenizer.end_token
        for piece in pieces:
            if piece.text:
                tokens = self.encoder.encode(piece.text, where, continued=size > 0)
                size += len(piece.text)
                if len(tokens):
                    self._append(tokens, piece.learned)
                    last = tokens[-1]
        if last is not None:
            if last != end_token:
                self._append([end_token], True)
            self._end(self.num_tokens)
        self.text_bytes += size
        return size

    def _append(self, tokens: np.ndarray | list[int], learned: bool) -> None:
        self.file.write(np.asarray(tokens, self.dtype).tobytes())
        if self.mask is not None:
            self.mask.write(np.full(len(tokens), learned, np.uint8).tobytes())
        self.num_tokens += len(tokens)

    def _end(self, position: int) -> None:
        self.ends.write(np.int64(position).tobytes())
        self.num_documents += 1

    def move_tail(self, num_tokens: int, to: "_PartWriter") -> None:
        """The last ``num_tokens`` of the only document become the (empty) other part's."""
        kept, share = self.num_tokens - num_tokens, num_tokens / max(1, self.num_tokens)
        for mine, other, width in ((self.file, to.file, self.dtype.itemsize), (self.mask, to.mask, 1)):
            if mine is not None and other is not None:
                mine.flush()
                with open(mine.name, "rb") as reader:
                    reader.seek(kept * width)
                    shutil.copyfileobj(reader, other)
                mine.truncate(kept * width)
        self.ends.seek(0)
        self.ends.truncate()
        self.num_documents = 0
        for writer, end in ((self, kept), (to, num_tokens)):
            if end:
                writer._end(end)
        to.num_tokens, to.text_bytes = num_tokens, round(self.text_bytes * share)
        self.num_tokens, self.text_bytes = kept, self.text_bytes - to.text_bytes

    def close(self) -> None:
        for file in (self.file, self.ends, self.mask):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()
