"""Text sampled from a checkpoint: the prompt as it was given, then what the model adds to it."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pypar.cli import main
from pypar.mesh import Mesh
from pypar.train.config import RunConfig, load_config
from pypar.train.generate import generate, printable
from pypar.train.preflight import check
from pypar.train.trainer import Trainer
from tests.train.data.tokenizer_kinds import MARK, word_piece

WORDS = ("the", "cat", "sat", "on", "a", "mat")


def _metaspace() -> Tokenizer:
    names = ("[UNK]", *(MARK + word for word in WORDS))
    library = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


def _checkpoint(folder: Path, library: Tokenizer | None, **data: object) -> Path:
    """Of a model that has learned nothing."""
    (folder / "text.txt").write_text("the cat sat on a mat " * 40)
    tokenizer = "bytes"
    if library is not None:
        library.add_special_tokens(["</s>"])
        library.save(str(folder / "tokenizer.json"))
        tokenizer = str(folder / "tokenizer.json")
    files = {"path": str(folder / "text.txt"), "cache_directory": str(folder / "cache")}
    config = RunConfig.from_dict(
        {
            "data": {**files, "tokenizer": tokenizer, **data},
            "model": {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16},
            "train": {"sequence_length": 8},
        }
    )
    return Trainer(config, Mesh(), torch.device("cpu")).save(folder / "checkpoints")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("words"), _metaspace())


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("bytes"), None)


def test_every_word_after_the_prompt_has_its_space(words: Path) -> None:
    for seed in range(4):
        text = generate(words, "the cat", 6, seed=seed)
        assert re.fullmatch(r"the cat( (the|cat|sat|on|a|mat)|\[UNK\])+", text), text
        begun = generate(words, "", 6, seed=seed)
        assert begun and not begun.startswith(" ")


@pytest.mark.parametrize(
    "prompt", ["the  cat", " the cat ", "the\tdog \u3000", "</s>", "the</s>cat", "caf\u00e9\r\n"]
)
def test_the_prompt_stands_first_as_it_was_given(
    words: Path, of_bytes: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    for path in (words, of_bytes):
        assert main(["generate", str(path), "--prompt", prompt, "--tokens", "3"]) == 0
        assert capsys.readouterr().out.startswith(prompt)


def test_a_word_piece_has_no_space(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, word_piece())
    texts = [generate(path, "the cat", 12, seed=seed) for seed in range(3)]
    assert all(text.startswith("the cat") and "##" not in text for text in texts), texts


def test_prompts_are_read_as_the_data_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def sample(model: object, prompt_T: torch.Tensor, num_tokens: int, **options: object) -> list[int]:
        seen.append(prompt_T.tolist())
        return []

    monkeypatch.setattr("pypar.train.generate.sample_tokens", sample)
    for special_tokens in ("text", "parse"):
        path = _checkpoint(tmp_path, _metaspace(), special_tokens=special_tokens)
        assert generate(path, "the</s>", 1) == "the</s>"
    assert seen == [[0], [1, 7]]  # one unknown word; a word and the end token


def test_a_prompt_that_is_not_utf8_is_refused(of_bytes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(of_bytes), "--prompt", b"caf\xc3".decode("utf-8", "surrogateescape")])
    assert ended.value.code == 2
    assert "pypar: --prompt must be text in UTF-8, but '\\udcc3' (position 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("train.sample_prompt", "caf\udcc3", "train.sample_prompt must be text in UTF-8"),
        ("data.special_tokens", "parsed", "did you mean 'parse'?"),
        ("data.special_tokens", "parse", "needs a tokenizer that has special tokens, and bytes have none"),
    ],
)
def test_a_run_is_refused_before_it_starts(tmp_path: Path, key: str, value: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check(load_config(None, [f"directory={tmp_path}"], {key: value}))
    assert not list(tmp_path.iterdir())


def test_only_what_the_model_wrote_is_made_printable() -> None:
    written = "a\x1b[2Jb\r\nc\rd\u3000\u00a0\x9b\x00\t\n"
    assert printable(written) == "a\ufffd[2Jb\r\nc\ufffdd\u3000\u00a0\ufffd\ufffd\t\n"
    assert printable("\x1b" + written, "\x1b") == "\x1b" + printable(written)
