"""Tokenizers: bytes, or any Hugging Face ``tokenizer.json``.

Both end a document with ``end_token``. Byte tokens keep 0 for it, because NUL does not occur in text.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

END_TOKENS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "[EOS]",
    "<end_of_text>",
)


class Tokenizer(Protocol):
    """What the data and generation need of a tokenizer."""

    vocab_size: int
    end_token: int
    fingerprint: str  # changes when the same text would become other tokens

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """Each byte of UTF-8 is a token; 0 ends a document."""

    vocab_size = 256
    end_token = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class FileTokenizer:
    """A ``tokenizer.json`` read by the library ``tokenizers``.

    The end of a document is the ``eos_token`` of the ``tokenizer_config.json`` beside it, else the first of
    ``END_TOKENS`` that the vocabulary holds.
    """

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ValueError(
                f"tokenizer {path} needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            self._library = Library.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer {path} is not a tokenizer.json: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=0)
        end, self.end_token = self._find_end_token(path)
        self.fingerprint = hashlib.sha256(f"{end}\n{text}".encode()).hexdigest()

    def _find_end_token(self, path: Path) -> tuple[str, int]:
        beside = path.with_name("tokenizer_config.json")
        names = list(END_TOKENS)
        if beside.is_file():
            try:
                eos: Any = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
            except (OSError, ValueError, AttributeError) as error:
                raise ValueError(f"{beside} cannot be read: {error}") from error
            eos = eos.get("content") if isinstance(eos, dict) else eos
            names = [eos, *names] if isinstance(eos, str) else names
        for name in names:
            token = self._library.token_to_id(name)
            if token is not None:
                return name, token
        raise ValueError(
            f"tokenizer {path} has no token that ends a document (looked for {', '.join(names)}); name one "
            f"as eos_token in {beside}"
        )

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._library.decode(tokens, skip_special_tokens=False)


def open_tokenizer(name: str) -> Tokenizer:
    """``"bytes"`` or the path of a tokenizer.json (or of the folder that holds it)."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"tokenizer {name!r} is neither 'bytes' nor a file; give the path of a tokenizer.json"
        )
    return FileTokenizer(path)
