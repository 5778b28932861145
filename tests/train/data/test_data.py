"""Sources, tokenizers, the token cache and the order of batches."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pypar.train.config import DataConfig
from pypar.train.data import sources
from pypar.train.data.windows import IGNORED, TokenData, open_data, shuffled
from tests.train.data.corpus import config_of, folder_of_texts


def _stream(data: TokenData, part: str) -> bytes:
    return np.asarray(data.tokens[part]).tobytes()


def test_folder_holds_every_document_once_with_its_end(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path)
    (folder / ".hidden").write_text("not read")
    (folder / "empty.txt").touch()
    data = open_data(config_of(tmp_path, folder, validation_fraction=0.2), 8, 0)
    parts = {part: _stream(data, part).split(b"\0") for part in ("train", "validation")}
    assert parts["train"].pop() == parts["validation"].pop() == b""
    expected = sorted(f.read_bytes() for f in folder.rglob("[0-9]*.txt"))
    assert sorted(parts["train"] + parts["validation"]) == expected
    assert 1 <= len(parts["validation"]) <= 20
    names = [f.name for f in sources.find_files(config_of(tmp_path, folder))]
    assert names == sorted(names) and names[0] == "part0/00.txt"
    assert data.cache.sizes["train"].text_bytes == sum(map(len, parts["train"]))


def test_split_does_not_move_when_a_document_is_added(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path)
    config = config_of(tmp_path, folder, validation_fraction=0.3)
    before = set(_stream(open_data(config, 8, 0), "validation").split(b"\0"))
    (folder / "new.txt").write_text("a new document\n")
    after = set(_stream(open_data(config, 8, 0), "validation").split(b"\0"))
    assert before <= after and after - before <= {b"a new document\n"}


def test_two_documents_give_one_to_each_side(tmp_path: Path) -> None:
    for fraction in (0.001, 0.999):
        data = open_data(
            config_of(tmp_path, folder_of_texts(tmp_path, 2), validation_fraction=fraction), 8, 0
        )
        assert _stream(data, "train").count(b"\0") == _stream(data, "validation").count(b"\0") == 1


def test_a_single_document_is_split_by_position(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(1, 256)) * 8)
    data = open_data(config_of(tmp_path, file, validation_fraction=0.25), 8, 0)
    assert _stream(data, "train") + _stream(data, "validation") == file.read_bytes() + b"\0"
    assert len(_stream(data, "validation")) == (255 * 8 + 1) // 4


def test_glob_and_pattern(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path)
    (folder / "note.md").write_text("# a note")
    found = sources.find_files(config_of(tmp_path, f"{folder}/part[01]/*.txt"))
    assert len(found) == 27 and found[0].name == "part0/00.txt"
    assert [f.name for f in sources.find_files(config_of(tmp_path, folder, pattern="*.md"))] == ["note.md"]


def test_python_stdlib_is_large_and_has_no_packages(tmp_path: Path) -> None:
    files = sources.find_files(DataConfig(path="python-stdlib"))
    assert sum(f.size for f in files) > 10e6
    assert not any("site-packages" in f.name for f in files)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: d / "nowhere", "does not exist"),
        (lambda d: d / "*.nothing", "no file matches"),
        (lambda d: d / "empty", "holds only empty files"),
        (lambda d: d / "bare", "it holds no file at all"),
        (lambda d: d / "nul.txt", "holds a NUL byte"),
        (lambda d: d / "short.txt", "lower train.sequence_length to at most"),
        (lambda d: d / "bad.jsonl", "bad.jsonl line 3 is not JSON"),
        (lambda d: d / "fields.jsonl", "line 2 must be"),
        (lambda d: d / "list.jsonl", "each text, not: list"),
        (lambda d: d / "number.jsonl", "each text, not: text (int)"),
        (lambda d: d / "deep.jsonl", "deep.jsonl line 1 is not JSON"),
        (
            lambda d: d / "chat.jsonl",
            'chat.jsonl line 1 holds "messages", and pypar does not render chat templates',
        ),
        (lambda d: d / "nul.jsonl", "nul.jsonl line 2 is not text: it holds a NUL byte"),
        (lambda d: d / "one.txt", "the train text holds 2 tokens but one sequence needs 33"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, make, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "nul.txt").write_bytes(b"text\0text" * 100)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (tmp_path / "fields.jsonl").write_text('{"text": "a"}\n{"prompt": "only"}\n')
    (tmp_path / "list.jsonl").write_text('["text"]\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "nul.jsonl").write_text('{"text": "a"}\n{"text": "a\\u0000"}\n')
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(ValueError, match="^[^\n]*$") as refused:
        open_data(config_of(tmp_path, make(tmp_path)), 32, 0)
    assert sentence in str(refused.value)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_pattern_without_a_match_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches data.pattern '\*.py' \(it holds 40 .txt\)"):
        sources.find_files(config_of(tmp_path, folder_of_texts(tmp_path), pattern="*.py"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("secret")
    file.chmod(0)
    with pytest.raises(ValueError, match="secret.txt cannot be read: Permission denied"):
        open_data(config_of(tmp_path, file), 2, 0)


def test_only_responses_and_their_ends_are_learned(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": "2+2=", "response": "4"},
        {"text": "plain text"},
        {"prompt": "é?", "response": "ü!"},
    ]
    file.write_text("\n".join(json.dumps(r) for r in records * 20))
    data = open_data(config_of(tmp_path, file, validation_fraction=0.1), 16, 0)
    learned: list[bytes] = []
    for part in ("train", "validation"):
        mask = data.learned[part]
        assert mask is not None and len(mask) == len(data.tokens[part])
        kept = np.asarray(data.tokens[part])[np.asarray(mask) == 1].tobytes()
        learned += kept.split(b"\0")[:-1]
    assert Counter(learned) == {b"4": 20, b"plain text": 20, "ü!".encode(): 20}
    tokens, targets, _ = data.train_batch(0, 4)
    stream = _stream(data, "train")
    start = stream.index(tokens[0].numpy().astype(np.uint8).tobytes())
    mask = data.learned["train"]
    assert mask is not None
    for t in range(16):
        assert targets[0, t] == (stream[start + t + 1] if mask[start + t + 1] else IGNORED)


def test_undecodable_bytes_are_tokens_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("straße".encode("latin-1") * 100)
    assert _stream(open_data(config_of(tmp_path, file), 8, 0), "train").startswith(b"stra\xdfe")


def test_windows_text_files(tmp_path: Path) -> None:
    """A mark of the encoding is no text; the two characters of a line end are."""
    for name, text in (("a.txt", "one\r\ntwo\r\n"), ("b.txt", ""), ("c.txt", "x")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "texts" / "d.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "record"}\r\n{"text": "other"}\r\n\r\n'
    )
    data = open_data(config_of(tmp_path, tmp_path / "texts", validation_fraction=0.9), 1, 0)
    held = (_stream(data, "train") + _stream(data, "validation")).split(b"\0")
    assert sorted(held) == [b"", b"one\r\ntwo\r\n", b"other", b"record", b"x"]
    assert sum(size.documents for size in data.cache.sizes.values()) == 4


def test_long_files_are_cut_at_line_ends_and_between_characters(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 7)
    file = tmp_path / "text.txt"
    for text in ("éüß€" * 9, "a line\n" * 5 + "€" * 8, "x" * 20):
        file.write_text(text)
        (source,) = sources.find_files(config_of(tmp_path, file))
        (pieces,) = [list(p) for _, p in source.documents()]
        assert "".join(p.text.decode() for p in pieces) == text


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 100))
def test_shuffled_is_a_bijection(count: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(count), count, seed, epoch)
    assert sorted(order) == list(range(count))
    some = np.arange(0, count, 7)
    assert (shuffled(some, count, seed, epoch) == order[some]).all()


def test_shuffled_mixes_and_depends_on_the_key() -> None:
    first, second = (shuffled(np.arange(1000), 1000, 0, epoch) for epoch in (0, 1))
    assert (first != second).mean() > 0.98
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    large = shuffled(np.array([0, 10**12]), 10**12 + 1, 5)
    assert ((large >= 0) & (large <= 10**12)).all()


def test_an_epoch_shows_every_window_once_and_the_next_cuts_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "count.txt"
    file.write_text("".join(chr(0x100 + i) for i in range(1000)))  # 2 bytes each: windows differ
    data = open_data(config_of(tmp_path, file), 10, 2)
    stream = _stream(data, "train")
    count = data.num_train_windows
    epochs: list[list[int]] = []
    for epoch in range(2):
        rows = [data.train_batch(sample, 1) for sample in range(epoch * count, (epoch + 1) * count)]
        starts = []
        for tokens, targets, _ in rows:
            starts.append(stream.index(bytes(tokens[0].tolist())))
            assert stream[starts[-1] + 1 : starts[-1] + 11] == bytes(targets[0].tolist())
        assert np.unique(np.diff(sorted(starts))).tolist() == [10]
        epochs.append(starts)
    assert epochs[0] != sorted(epochs[0]) and set(epochs[0]) != set(epochs[1])


def test_batches_are_a_function_of_seed_and_sample(tmp_path: Path) -> None:
    config = config_of(tmp_path, folder_of_texts(tmp_path))
    one, two, other = (open_data(config, 16, seed) for seed in (0, 0, 1))
    for sample in (20, 0, 12):
        a, b = one.train_batch(sample, 4), two.train_batch(sample, 4)
        assert a[0].equal(b[0]) and a[1].equal(b[1]) and a[0].dtype == a[1].dtype
        assert a[0][:, 1:].equal(a[1][:, :-1])
    assert not one.train_batch(0, 4)[0].equal(other.train_batch(0, 4)[0])
    rows = [one.train_batch(sample, 1)[0] for sample in range(4)]
    assert all(
        one.train_batch(0, 4)[0][i].equal(rows[i][0]) for i in range(4)
    )  # sample g, whatever the batch


def test_validation_covers_every_window_once_and_pads_the_last_batch(tmp_path: Path) -> None:
    data = open_data(config_of(tmp_path, folder_of_texts(tmp_path), validation_fraction=0.3), 16, 0)
    windows = data.num_validation_windows
    assert windows % 5
    seen = 0
    for index in range(data.num_validation_batches(5)):
        tokens, targets, _ = data.validation_batch(index, 5)
        assert tokens.shape == targets.shape == (5, 16)
        seen += int((targets != IGNORED).any(1).sum())
    assert seen == windows
    again = open_data(config_of(tmp_path, tmp_path / "texts", validation_fraction=0.3), 16, 9)
    assert again.validation_batch(0, 4)[0].equal(data.validation_batch(0, 4)[0])  # whatever the seed


def test_entropies_against_a_direct_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pypar.train.data.windows.ENTROPY_CHUNK", 100)
    data = open_data(config_of(tmp_path, folder_of_texts(tmp_path), validation_fraction=0.3), 16, 0)
    text = _stream(data, "validation")
    singles, pairs = Counter(text), Counter(zip(text, text[1:], strict=False))
    befores = Counter(text[:-1])
    unigram = -sum(n / len(text) * math.log(n / len(text)) for n in singles.values())
    bigram = -sum(n / (len(text) - 1) * math.log(n / befores[a]) for (a, _), n in pairs.items())
    assert data.validation_entropies() == pytest.approx({"unigram": unigram, "bigram": bigram}, rel=1e-9)
