"""Tokenizers: bytes, or any Hugging Face ``tokenizer.json``.

Both put ``end_token`` after a document. Byte tokens keep 0 for it, because NUL does not occur in text.

A special token is one that ``tokenizer.json`` marks as special, and the one that ends a document. Text that holds its
name ("</s>" in a web page) is text, made of ordinary tokens, unless ``data.special_tokens`` is "parse".
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

SPECIAL_TOKENS = ("text", "parse")  # what ``data.special_tokens`` may be

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
    text_names: tuple[str, ...]  # names of special tokens, which text may hold as text

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """The tokens of ``text``; continued: other text precedes it, so it gains no space in front."""
        ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """Each byte of UTF-8 is a token; 0 ends a document."""

    vocab_size = 256
    end_token = 0
    fingerprint = "bytes"
    text_names: tuple[str, ...] = ()

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class FileTokenizer:
    """A ``tokenizer.json`` read by the library ``tokenizers``.

    The end of a document is the ``eos_token`` of the ``tokenizer_config.json`` beside it, else the first of
    ``END_TOKENS`` that the vocabulary holds. special_tokens: whether their names in text are "text", or "parse".
    """

    def __init__(self, path: Path, special_tokens: str = "text") -> None:
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
        self._text = text
        self._encoders: dict[bool, Any] = {}  # continued or not; a large one takes a second to make
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=0)
        end, self.end_token = self._find_end_token(path)
        added = json.loads(text).get("added_tokens", [])
        special = {end, *(token["content"] for token in added if token["special"])}
        self.text_names = () if special_tokens == "parse" else tuple(sorted(special))
        self.fingerprint = hashlib.sha256(f"{special_tokens}\n{end}\n{text}".encode()).hexdigest()

    def _find_end_token(self, path: Path) -> tuple[str, int]:
        beside = path.with_name("tokenizer_config.json")
        names = list(END_TOKENS)
        if beside.is_file():
            try:
                eos: Any = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
            except (OSError, ValueError, AttributeError, RecursionError) as error:
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

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        if continued not in self._encoders:
            description = json.loads(self._text)
            _hide(description, self.text_names)
            if continued:
                _add_no_space(description)
            encoder = type(self._library).from_str(json.dumps(description))
            encoder.no_truncation()
            encoder.no_padding()
            self._encoders[continued] = encoder
        return self._encoders[continued].encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._library.decode(tokens, skip_special_tokens=False)


def _hide(description: dict[str, Any], special: Iterable[str]) -> None:
    """Give the special tokens of a tokenizer.json names that no text holds; every token keeps its id.

    The library's ``encode_special_tokens`` only keeps them from being cut out of the text first: the vocabulary of a
    Unigram or WordLevel model holds the same names, and finds them again.
    """
    hidden = {name: f"\U0010ffff{number}\U0010ffff" for number, name in enumerate(special)}  # noncharacters
    model = description["model"]
    for token in description.get("added_tokens", []):
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): token for name, token in model["vocab"].items()}
    else:  # Unigram: a name and its logarithmic probability, in the order of the ids
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _names_of(merge) & hidden.keys()]


def _names_of(merge: str | list[str]) -> set[str]:
    """The two tokens of a merge, and the one that it makes."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _add_no_space(description: dict[str, Any]) -> None:
    """Take out what puts a space before the first word: the tokenizers of SentencePiece do, some of GPT-2's kind."""
    for key, members in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        first = description.get(key) or {}
        while first.get("type") == "Sequence" and first[members]:
            first = first[members][0]  # behind one that cuts at spaces, the mark is what keeps words apart
        if first.get("type") == "Prepend":
            first.clear()
            first |= {"type": "Sequence", "normalizers": []}
        elif first.get("type") == "Metaspace":
            first.pop("add_prefix_space", None)
            first["prepend_scheme"] = "never"
        elif first.get("type") == "ByteLevel":
            first["add_prefix_space"] = False


def continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that the tokens ``new`` add to that of ``prompt``.

    Both are decoded as one text and the prompt's own is cut off it: alone, the first word of a SentencePiece
    tokenizer loses the space in front of it, and bytes that complete a character have no text.
    """
    whole, before = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
    if not whole.startswith(before):
        before = before.rstrip("\ufffd")  # the prompt ended within a character
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(new)  # the decoder tidied the prompt's end, as WordPiece's does with "is n't"


def check_text(key: str, text: str) -> None:
    """ValueError where ``text`` came from bytes that are not UTF-8: Python passes them on as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} must be text in UTF-8, but {text[error.start : error.end]!r} (position {error.start}) is not; "
            "give it in UTF-8"
        ) from error


def open_tokenizer(name: str, special_tokens: str = "text") -> Tokenizer:
    """``"bytes"`` or the path of a tokenizer.json (or of the folder that holds it).

    special_tokens: see ``DataConfig``.
    """
    if special_tokens not in SPECIAL_TOKENS:
        raise ValueError(f"data.special_tokens {special_tokens!r} is not one of {', '.join(SPECIAL_TOKENS)}")
    if name == "bytes":
        if special_tokens != "text":
            raise ValueError(
                f"data.special_tokens {special_tokens!r} needs a tokenizer that has special tokens, and bytes have "
                "none; set data.tokenizer to the path of a tokenizer.json"
            )
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"tokenizer {name!r} is neither 'bytes' nor a file; give the path of a tokenizer.json"
        )
    return FileTokenizer(path, special_tokens)
