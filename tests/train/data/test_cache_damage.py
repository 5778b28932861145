"""A token cache that was damaged is built again or refused; a batch never holds a token that the tokenizer has not."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from pypar.train.config import DataConfig
from pypar.train.data import cache
from pypar.train.data.tokens import ByteTokenizer
from pypar.train.data.windows import TokenData, open_data


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Records with a mask of what is learned, so that every kind of file is there."""
    lines = [json.dumps({"prompt": f"{i} and {i}", "response": f" is {2 * i}"}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return DataConfig(path=str(tmp_path / "text.jsonl"), cache_directory=str(tmp_path / "cache"))


def _content(built: cache.TokenCache) -> list[bytes]:
    columns = [f(part) for f in (built.tokens, built.learned, built.ends) for part in cache.PARTS]
    return [column.tobytes() for column in columns if column is not None]


def test_a_damaged_description_never_gives_other_tokens(config: DataConfig) -> None:
    """150 damages of meta.json: what is not refused and built again must be what was there."""
    built = cache.prepare_cache(config, ByteTokenizer())
    expected, meta = _content(built), built.path / "meta.json"
    whole = meta.read_bytes()
    chosen = random.Random(0)
    rebuilt = 0
    for _ in range(150):
        damaged = bytearray(whole)
        at = chosen.randrange(len(damaged))
        if chosen.random() < 0.6:
            damaged[at] ^= 1 << chosen.randrange(8)
        else:
            damaged[at : at + chosen.randint(0, 9)] = chosen.choice(
                [b"[", b"9", b'"', b"-1", b"\0", b"null"]
            ) * chosen.randint(0, 5)
        meta.write_bytes(damaged)
        again = cache.prepare_cache(config, ByteTokenizer())
        assert _content(again) == expected and again.dtype == "uint8" and again.has_mask
        rebuilt += meta.read_bytes() == whole
    assert rebuilt > 100


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        " " * (1 << 17) + "{}",
        '{"dtype": "object"}',
        '{"dtype": "int8", "has_mask": true}',
        "NaN",
        "[]",
    ],
)
def test_a_hostile_description_is_built_again(config: DataConfig, text: str) -> None:
    built = cache.prepare_cache(config, ByteTokenizer())
    expected = _content(built)
    (built.path / "meta.json").write_text(text)
    assert _content(cache.prepare_cache(config, ByteTokenizer())) == expected


def test_files_of_another_length_are_built_again(config: DataConfig) -> None:
    built = cache.prepare_cache(config, ByteTokenizer())
    expected = _content(built)
    for name in (f"{part}.{kind}" for part in cache.PARTS for kind in ("tokens", "learned", "ends")):
        whole = (built.path / name).read_bytes()
        for content in (whole[:-1], whole + b"x", b""):
            (built.path / name).write_bytes(content)
            assert _content(cache.prepare_cache(config, ByteTokenizer())) == expected, name


def test_ends_of_documents_out_of_order_are_refused_before_a_kernel_sees_them(config: DataConfig) -> None:
    built = cache.prepare_cache(config, ByteTokenizer())
    ends = np.fromfile(built.path / "train.ends", np.int64)
    ends[2], ends[3] = ends[3], ends[2]
    ends.tofile(built.path / "train.ends")
    data = open_data(config, 27, 0, packed_documents=True)
    with pytest.raises(
        ValueError, match=r"is damaged: the ends of its documents are not in order; delete it"
    ):
        data.train_batch(0, data.num_train_windows)


class _FewTokens(ByteTokenizer):
    vocab_size = 100


def test_a_token_beyond_the_vocabulary_is_refused_before_a_kernel_sees_it(config: DataConfig) -> None:
    data = open_data(config, 16, 0)
    low = np.where(np.array(data.tokens["train"]) < 100, data.tokens["train"], 99).astype(np.uint8)
    few = TokenData(data.cache, _FewTokens(), 16, 0)
    few.tokens["train"] = low
    few.train_batch(0, few.num_train_windows)
    low[len(low) // 2] = 200
    with pytest.raises(
        ValueError, match=r"is damaged: it holds token 200, but the tokenizer has 100; delete it"
    ):
        for epoch in range(3):  # a window more or less at the text's ends
            few.train_batch(epoch * few.num_train_windows, few.num_train_windows)
