"""Tokenizers: a Hugging Face tokenizer.json, its end token, and what is none."""

import json
from pathlib import Path

import pytest

from pypar.train.config import DataConfig
from pypar.train.data import open_data
from pypar.train.tokens import open_tokenizer


def _tokenizer_file(tmp_path: Path, end: str = "<|endoftext|>") -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 5, trainer)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    return path


def test_hugging_face_tokenizer(tmp_path: Path) -> None:
    path = _tokenizer_file(tmp_path)
    tokenizer = open_tokenizer(str(path))
    text = "the dog sat on the mat: é\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text)
    file = tmp_path / "text.txt"
    file.write_text(text * 300)
    cache = str(tmp_path / "cache")
    data = open_data(DataConfig(str(file), tokenizer=str(path), cache_directory=cache), 16, 0)
    assert data.vocab_size == tokenizer.vocab_size and data.cache.dtype == "uint16"
    streams = [data.tokens["train"].tolist(), data.tokens["validation"].tolist()]
    assert streams[1][-1] == tokenizer.end_token
    assert tokenizer.decode(streams[0] + streams[1][:-1]) == text * 300
    assert set(data.validation_entropies()) == {"unigram"}
    bytes_cache = open_data(DataConfig(str(file), cache_directory=cache), 16, 0).cache.path
    assert bytes_cache != data.cache.path and data.cache.path.is_dir()


def test_end_token_of_a_tokenizer(tmp_path: Path) -> None:
    path = _tokenizer_file(tmp_path, end="<stop>")
    with pytest.raises(ValueError, match="has no token that ends a document"):
        open_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert open_tokenizer(str(tmp_path)).end_token == 0


def test_tokenizers_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        open_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="neither 'bytes' nor a file"):
        open_tokenizer("byte")
