"""Tokenizers: a Hugging Face tokenizer.json, its end token and special tokens, and what is none."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pypar.train.config import DataConfig
from pypar.train.data.tokens import ByteTokenizer, check_text, continuation, open_tokenizer
from pypar.train.data.windows import open_data
from tests.train.data.tokenizer_kinds import KINDS, MARK, SPECIAL, unigram, word_level, word_piece


def _tokenizer_file(tmp_path: Path, end: str = "<|endoftext|>") -> Path:
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


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A tokenizer of each kind, saved in tmp_path."""
    library = KINDS[request.param]()
    library.add_special_tokens(list(SPECIAL))
    library.add_tokens([AddedToken("<think>", special=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    return request.param


def test_the_name_of_a_special_token_is_text(kind: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.text_names == tuple(sorted(SPECIAL))
    special = {1, 2} if kind.startswith("word") else {0, 1, 2}  # <unk> is also what an unknown word becomes
    for text in ("</s>", "a</s>b", "a </s> b", "<s> a </s>", "</s></s>", "<unk>", "<s>\n</s>"):
        tokens = tokenizer.encode(text)
        assert tokens and not special & set(tokens), text
        assert not special & set(tokenizer.encode(text, continued=True))
    if kind in ("unigram", "llama"):
        assert tokenizer.decode(tokenizer.encode("a</s> the")) == "a</s> the"
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = "the cat sat on <think> the a b"
    assert tokenizer.encode(plain) == library.encode(plain, add_special_tokens=False).ids
    assert library.token_to_id("<think>") in tokenizer.encode(
        plain
    )  # which the tokenizer does not call special


def test_what_a_chat_template_wrote_is_parsed(kind: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(tmp_path), "parse")
    assert tokenizer.text_names == ()
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<s>the cat</s>sat"
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert {1, 2} <= set(tokenizer.encode(text))
    assert tokenizer.fingerprint != open_tokenizer(str(tmp_path)).fingerprint


def test_an_end_token_that_is_not_marked_special_is_special(tmp_path: Path) -> None:
    """As Phi-3's "</s>"."""
    library = unigram()
    library.add_tokens([AddedToken("</s>", special=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.end_token == 2 and tokenizer.text_names == ("</s>",)
    assert 2 not in tokenizer.encode("a</s>b")


def test_a_file_without_added_tokens(tmp_path: Path) -> None:
    description = json.loads(word_level().to_str())
    del description["added_tokens"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.text_names == ("</s>",) and tokenizer.encode("the </s>") == [7, 0]


def test_bytes_have_nothing_to_parse_and_only_two_values_are_known() -> None:
    with pytest.raises(ValueError, match="'parse' needs a tokenizer that has special tokens"):
        open_tokenizer("bytes", "parse")
    with pytest.raises(ValueError, match="'token' is not one of text, parse"):
        open_tokenizer("bytes", "token")


def test_text_that_continues_other_text_gains_no_space(kind: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(tmp_path))
    if kind in ("unigram", "llama", "byte level"):
        for first, second in (("the", "m"), ("the", " cat"), ("the ", "cat"), ("the\n", "sat"), ("a", "")):
            tokens = tokenizer.encode(first) + tokenizer.encode(second, continued=True)
            assert tokenizer.decode(tokens).lstrip(" ") == first + second
    else:  # words: the cut is a border between them
        assert tokenizer.encode("the") + tokenizer.encode("cat", continued=True) == tokenizer.encode(
            "the cat"
        )


def test_a_mark_behind_a_cut_at_spaces_stays(tmp_path: Path) -> None:
    """As in T5's older files: there the mark is what keeps the words apart."""
    library = unigram()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("the cat") + tokenizer.encode("sat on", continued=True)) == (
        "the cat sat on"
    )


@pytest.mark.parametrize(
    ("prompt", "whole"),
    [
        ("the cat", "the cat sat on"),
        ("the", "the cat"),
        ("the cat ", "the cat sat"),
        ("  the", "  the cat"),
        ("th", "the cat"),
        ("", "the cat"),
        ("a", "a.b"),
        ("caf\u00e9", "caf\u00e9s \u20ac"),
    ],
)
def test_prompt_and_continuation_make_the_text(kind: str, tmp_path: Path, prompt: str, whole: str) -> None:
    """The text is cut where the prompt ends among the tokens, whatever each of these would be alone."""
    tokenizer = open_tokenizer(str(tmp_path))
    first, rest = tokenizer.encode(prompt), whole.removeprefix(prompt)
    new = tokenizer.encode(rest, continued=bool(prompt))
    expected = rest
    if kind.startswith("word"):  # loses what it does not know, and puts a space before each word
        expected = tokenizer.decode(first + new).removeprefix(tokenizer.decode(first))
    elif kind == "byte level" and not prompt:
        expected = " " + rest  # as this tokenizer begins every text
    assert continuation(tokenizer, first, new) == expected


def test_words_keep_the_space_between_them(tmp_path: Path) -> None:
    word_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    assert continuation(tokenizer, tokenizer.encode("the cat"), tokenizer.encode("sat on")) == " sat on"


def test_a_word_piece_goes_on_with_the_prompts_word(tmp_path: Path) -> None:
    word_piece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    end = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id
    assert continuation(tokenizer, tokenizer.encode("the cat"), [end("##s"), end("sat")]) == "s sat"
    assert continuation(tokenizer, tokenizer.encode("the"), [end("."), end("cat")]) == ". cat"


def test_where_the_decoder_tidies_the_prompts_end_the_new_tokens_stand_alone(tmp_path: Path) -> None:
    library = unigram()
    library.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Replace(" .", ".")]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    prompt, dot = tokenizer.encode("the "), tokenizer.encode(".", continued=True)
    assert (tokenizer.decode(prompt), tokenizer.decode(prompt + dot)) == (" the ", " the.")
    assert continuation(tokenizer, prompt, dot) == "."


def test_bytes_complete_the_prompts_character() -> None:
    tokenizer, text = ByteTokenizer(), "caf\u00e9 \u20ac".encode()
    assert [continuation(tokenizer, list(text[:n]), list(text[n:])) for n in (3, 4, 5)] == [
        "\u00e9 \u20ac",
        "\u00e9 \u20ac",
        " \u20ac",
    ]
    assert continuation(tokenizer, list(text), list(text[:4])) == "caf\ufffd"
    assert continuation(tokenizer, list("\ufffd".encode()), list(b"a")) == "a"


def test_a_prompt_of_other_bytes_is_refused() -> None:
    check_text("the prompt", "\u00e9\ufffd\U0010ffff")
    with pytest.raises(
        ValueError, match=r"^--prompt must be text in UTF-8, but '\\udcff' \(position 1\) is not"
    ):
        check_text("--prompt", b"a\xff".decode("utf-8", "surrogateescape"))


def test_pieces_of_a_file_are_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that begins a text with a space does not begin each piece with one; what is not UTF-8 is noted."""
    monkeypatch.setattr("pypar.train.data.sources.PIECE_BYTES", 16)
    library = unigram()
    library.add_special_tokens(list(SPECIAL))
    library.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "texts"
    folder.mkdir()
    text = "the cat sat\non the cat\n" * 9
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_bytes(b"the \xff\n cat " * 9)
    config = DataConfig(
        str(folder), tokenizer=str(tmp_path), cache_directory=str(tmp_path / "c"), validation_fraction=0.5
    )
    data = open_data(config, 4, 0)
    tokenizer = open_tokenizer(str(tmp_path))
    texts = [tokenizer.decode(data.tokens[part][:-1].tolist()) for part in ("train", "validation")]
    assert text in texts
    (note,) = data.cache.notes
    assert note.startswith(
        f"documents that are not UTF-8: 1, the first {folder}/b.txt; what could not be decoded"
    )
