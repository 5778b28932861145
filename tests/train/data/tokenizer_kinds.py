"""Small tokenizers of each kind that a tokenizer.json may hold."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<unk>", "<s>", "</s>")
MARK = "\u2581"  # SentencePiece's sign for a space
CHARACTERS = (*"abcdehikmnopqrstuxyz</>.'\n", MARK)
WORDS = ("a", "b", "cat", "sat", "the", "on")


def unigram() -> Tokenizer:
    """As SentencePiece's: the vocabulary itself holds the special tokens, and likes them best."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(c, -3.0) for c in (*CHARACTERS, *"\u00e9\u20ac")]
    library = Tokenizer(models.Unigram(pieces + [(MARK + word, -1.0) for word in WORDS], 0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


def llama() -> Tokenizer:
    """BPE as Llama's: a normalizer marks the spaces, and bytes stand for what has no token."""
    pairs = [
        ("c", "a"),
        ("ca", "t"),
        (MARK, "cat"),
        ("s", "a"),
        ("sa", "t"),
        (MARK, "sat"),
        ("<", "/"),
        ("</", "s"),
    ]
    pairs += [("</s", ">")]  # the special token could also be merged from text
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
    names += [left + right for left, right in pairs if left + right not in SPECIAL]
    library = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, pairs, unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    library.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


def byte_level() -> Tokenizer:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    return library


def word_level() -> Tokenizer:
    library = Tokenizer(models.WordLevel({n: i for i, n in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def word_piece() -> Tokenizer:
    names = (*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *WORDS[2:], "##s")
    library = Tokenizer(
        models.WordPiece({n: i for i, n in enumerate(dict.fromkeys(names))}, unk_token="<unk>")
    )
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return library


KINDS = {
    "unigram": unigram,
    "llama": llama,
    "byte level": byte_level,
    "word level": word_level,
    "word piece": word_piece,
}
