"""Documents packed into one sequence do not see each other, and the end of one does not predict the next."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from pypar.models import Decoder, DecoderConfig, Sequences
from pypar.train.config import DataConfig, load_config
from pypar.train.data.windows import IGNORED, TokenData, open_data
from pypar.train.preflight import check

SIZES = DecoderConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_size=4, d_ff=24
)


def test_each_document_has_the_logits_that_it_has_alone() -> None:
    model = Decoder(SIZES, dtype=torch.float64)
    tokens = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(0))
    documents = [[0, 4, 5, 13], [0, 0, 9, 13]]
    ends = tuple(torch.tensor(row, dtype=torch.int32) for row in documents)
    with torch.no_grad():
        packed = model(tokens, sequences=Sequences(13, ends))
        for row, bounds in enumerate(documents):
            for start, end in zip(bounds, bounds[1:], strict=False):
                alone = model(tokens[row : row + 1, start:end])
                torch.testing.assert_close(packed[row, start:end], alone[0], rtol=1e-10, atol=1e-10)


def _data(folder: Path, length: int, packed: bool, records: list[dict], **more: object) -> TokenData:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(
        path=str(file), cache_directory=str(folder / "cache"), validation_fraction=0.2, **more
    )  # type: ignore[arg-type]
    return open_data(config, length, 0, packed)


RECORDS = [
    *({"text": "ab" * (n % 4)} for n in range(60)),  # every fourth is empty: no document
    *({"prompt": "question?"[n:], "response": "answer"[:n]} for n in range(7)),
    {"text": "a long document " * 5},
]


def test_documents_of_records(tmp_path: Path) -> None:
    data = _data(tmp_path, 4, True, RECORDS)
    texts = [r["text"] if "text" in r else r["prompt"] + r["response"] for r in RECORDS]
    parts = [np.split(data.tokens[part], data.ends[part]) for part in ("train", "validation")]
    assert [len(part.pop()) for part in parts] == [0, 0]  # nothing follows the last end
    assert Counter(bytes(x) for part in parts for x in part) == Counter(f"{t}\0".encode() for t in texts if t)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_documents_and_targets_of_every_window(tmp_path: Path, length: int) -> None:
    """Windows begin and end at, before and after the ends of documents; what is a target, is of the same document."""
    packed, plain = (_data(tmp_path, length, told, RECORDS) for told in (True, False))
    stream, learned = (np.asarray(x["train"], np.int64) for x in (packed.tokens, packed.learned))
    ends = packed.ends["train"]
    number = np.searchsorted(ends, np.arange(len(stream)), side="right")  # the document of each position
    starts = np.arange(len(stream) - length)
    batch, same = (data._windows("train", starts, len(starts)) for data in (packed, plain))
    assert batch.tokens.equal(same.tokens) and same.documents is None
    for start, tokens, targets, row in zip(starts, batch.tokens, batch.targets, batch.documents, strict=True):
        window = number[start : start + length + 1]
        inner = (np.flatnonzero(np.diff(window[:-1])) + 1).tolist()
        assert row.dtype == torch.int32 and row.tolist() == [0, *inner, length]
        assert tokens.tolist() == stream[start : start + length].tolist()
        counts = (np.diff(window) == 0) & (learned[start + 1 : start + length + 1] == 1)
        assert targets.tolist() == np.where(counts, stream[start + 1 : start + length + 1], IGNORED).tolist()
    counts = learned[(starts[:, None] + np.arange(1, length + 1))] == 1
    assert (same.targets.numpy() != IGNORED).tolist() == counts.tolist()


def test_batches_are_such_windows(tmp_path: Path) -> None:
    data = _data(tmp_path, 12, True, RECORDS)
    train = [data.train_batch(n, 2) for n in range(data.num_train_windows // 2)]
    validation = [data.validation_batch(n, 2) for n in range(data.num_validation_batches(2))]
    for tokens, targets, documents in (*train, *validation):
        assert documents is not None
        for row, own_targets, ends in zip(tokens, targets, documents, strict=True):
            assert ends[0] == 0 and ends[-1] == 12
            assert (row[ends[1:-1] - 1] == 0).all() and (own_targets[ends[1:-1] - 1] == IGNORED).all()
    assert sum(len(ends) - 2 for batch in train for ends in batch.documents or ()) > 20


def test_a_single_document_has_two_parts_and_no_end_within(tmp_path: Path) -> None:
    data = _data(tmp_path, 8, True, [{"text": "one document, split by position " * 4}])
    for part in ("train", "validation"):
        assert data.ends[part].tolist() == [len(data.tokens[part])]
    tokens, targets, documents = data.validation_batch(0, 1)
    assert documents is not None and documents[0].tolist() == [0, 8]
    assert (targets != IGNORED).all() and tokens[0, 1:].equal(targets[0, :-1])


# ---- a chat template whose end-of-turn token is the tokenizer's end token: ChatML, as Qwen has it

QUESTION, ANSWER = "<|im_start|>user a b c<|im_end|><|im_start|>assistant", " c b a<|im_end|>"


def _chat(folder: Path, length: int, records: list[dict], **more: object) -> tuple[TokenData, dict[str, int]]:
    words = ("[UNK]", "a", "b", "c", "user", "assistant")
    library = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    data = _data(folder, length, True, records, tokenizer=str(folder), **more)
    return data, library.get_vocab()


@pytest.mark.parametrize("response", [False, True])
def test_end_tokens_inside_a_text_do_not_cut_it(tmp_path: Path, response: bool) -> None:
    """The question is seen from the answer, and no target is lost but those of the next record and the prompt."""
    record = {"prompt": QUESTION, "response": ANSWER} if response else {"text": QUESTION + ANSWER}
    data, ids = _chat(tmp_path, 23, [record] * 40, special_tokens="parse")
    start, end = ids["<|im_start|>"], ids["<|im_end|>"]
    one = [start, 4, 1, 2, 3, end, start, 5, 3, 2, 1, end]  # 12 tokens: its own end token ends it
    assert data.tokens["train"].tolist() == one * data.cache.sizes["train"].documents
    learned = [n >= 8 or not response for n in range(12)]
    tokens, targets, documents = data.train_batch(0, 4)
    for row, own_targets, ends in zip(tokens.tolist(), targets.tolist(), documents or (), strict=True):
        shift = next(n for n in range(12) if (one * 3)[n : n + 23] == row)
        assert ends.tolist() == [0, *(n for n in (12 - shift, 24 - shift) if n < 23), 23]
        places = [(shift + n + 1) % 12 for n in range(23)]
        assert own_targets == [one[p] if p and learned[p] else IGNORED for p in places]
    assert not data.cache.notes


def test_text_that_names_special_tokens_is_text_and_a_note_says_so(tmp_path: Path) -> None:
    data, ids = _chat(tmp_path, 8, [{"text": QUESTION + ANSWER}] * 40)
    for part in ("train", "validation"):
        ends = np.flatnonzero(data.tokens[part] == ids["<|im_end|>"]) + 1
        assert ends.tolist() == data.ends[part].tolist()
        assert ids["<|im_start|>"] not in data.tokens[part]
    (note,) = data.cache.notes
    assert "<|im_end|> (80 times)" in note and "<|im_start|> (80 times)" in note
    assert note.endswith("where a chat template wrote them, set data.special_tokens=parse")
    files = {"data.path": tmp_path / "records.jsonl", "data.tokenizer": tmp_path, "directory": tmp_path}
    files |= {"data.cache_directory": tmp_path / "cache", "train.sequence_length": 8, "model.vocab_size": 64}
    assert note in check(load_config(None, [f"{key}={value}" for key, value in files.items()])).notes
