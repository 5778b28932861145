"""Batches of token windows, functions of (seed, sample) alone: the same in every layout and after a restart."""

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pypar.train.data.cache import TokenCache, prepare_cache
from pypar.train.data.tokens import Tokenizer, open_tokenizer
from pypar.train.sections import DataConfig

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # target of a position that does not count in the loss
SHUFFLE_ROUNDS = 6
ENTROPY_CHUNK = 1 << 22  # tokens


def _key(*parts: int) -> int:
    """64 bits that depend on every part, the same on every machine and version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def shuffled(index: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Where each ``index`` (int64, < ``count``) goes in the random order of ``count`` that ``key`` chooses.

    A Feistel network over the smallest even number of bits that holds ``count``, walked until the value is in
    range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): a bijection without a table.
    """
    half = np.uint64(max(1, (max(1, count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = [np.uint64(_key(*key, r)) for r in range(SHUFFLE_ROUNDS)]

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            mixed = right ^ round_key
            for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # the finaliser of SplitMix64
                mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(multiplier)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    out = permute(np.asarray(index, np.uint64))
    while (outside := out >= np.uint64(count)).any():
        out[outside] = permute(out[outside])
    return out.astype(np.int64)


class Batch(NamedTuple):
    """Windows of the text, as `split_batch` takes them.

    tokens, targets: int64 [B, T]; targets that do not count are -100. documents: where the documents of each window
    begin and end, int32 [documents + 1] from 0 to T; the first and the last may go on outside of the window. None
    where documents are not told apart.
    """

    tokens: "Tensor"
    targets: "Tensor"
    documents: "list[Tensor] | None"


class TokenData:
    """Training and validation windows of ``sequence_length + 1`` tokens (inputs, and targets one later).

    Training sample g of a run is window ``shuffled(g mod W)`` of epoch ``g // W``; each epoch also starts at
    another offset, so that windows are cut elsewhere. Validation windows are cut once, in one random order.
    packed_documents: the first token of a document is no target.
    """

    def __init__(
        self,
        cache: TokenCache,
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        packed_documents: bool = False,
    ) -> None:
        self.cache, self.sequence_length, self.seed = cache, sequence_length, seed
        self.vocab_size = tokenizer.vocab_size
        self.packed_documents = packed_documents
        self.tokens = {part: cache.tokens(part) for part in ("train", "validation")}
        self.learned = {part: cache.learned(part) for part in ("train", "validation")}
        self.ends = {part: cache.ends(part) for part in ("train", "validation")}
        for part, tokens in self.tokens.items():
            if len(tokens) < sequence_length + 1:
                remedy = (
                    f"lower train.sequence_length to at most {len(tokens) - 1}"
                    if len(tokens) > 1
                    else "add text"
                )
                also = ", raise data.validation_fraction" if part == "validation" else ""
                raise ValueError(
                    f"the {part} text holds {len(tokens)} tokens but one sequence needs "
                    f"{sequence_length + 1} (train.sequence_length + 1); {remedy}{also} or add data"
                )
        self.num_train_windows = max(1, (len(self.tokens["train"]) - sequence_length) // sequence_length)
        self.num_validation_windows = (len(self.tokens["validation"]) - 1) // sequence_length

    def train_batch(self, first_sample: int, num_samples: int) -> Batch:
        """The run's samples from ``first_sample`` on; the first of all is 0."""
        samples = np.arange(first_sample, first_sample + num_samples)
        epochs, index = np.divmod(samples, self.num_train_windows)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            order = shuffled(index[now], self.num_train_windows, self.seed, int(epoch))
            starts[now] = order * self.sequence_length + self._offset(int(epoch))
        return self._windows("train", starts, num_samples)

    def _offset(self, epoch: int) -> int:
        slack = len(self.tokens["train"]) - 1 - self.num_train_windows * self.sequence_length
        return _key(self.seed, epoch, -1) % (min(slack, self.sequence_length - 1) + 1)

    def num_validation_batches(self, batch_size: int) -> int:
        return -(-self.num_validation_windows // batch_size)

    def validation_batch(self, index: int, batch_size: int) -> Batch:
        """Like ``train_batch``; rows past the last window are zeros whose targets are all ignored."""
        windows = np.arange(index * batch_size, min((index + 1) * batch_size, self.num_validation_windows))
        starts = shuffled(windows, self.num_validation_windows, 0) * self.sequence_length
        return self._windows("validation", starts, batch_size)

    def _windows(self, part: str, starts: np.ndarray, batch_size: int) -> Batch:
        import torch

        length, stream, learned = self.sequence_length, self.tokens[part], self.learned[part]
        tokens = np.zeros((batch_size, length), np.int64)
        targets = np.full((batch_size, length), IGNORED, np.int64)
        documents = [np.array([0, length], np.int32) for _ in range(batch_size)]
        for row, start in enumerate(starts):
            window = stream[start : start + length + 1]
            tokens[row], targets[row] = window[:-1], window[1:]
            if learned is not None:
                targets[row, learned[start + 1 : start + length + 1] == 0] = IGNORED
            if self.packed_documents:
                ends = self._ends_within(part, start)
                targets[row, ends - 1] = IGNORED  # the first token of the next document
                documents[row] = np.concatenate([[0], ends[ends < length], [length]], dtype=np.int32)
        last = max(tokens.max(), targets.max())
        if last >= self.vocab_size:  # kernels that look up logits trust what they are given
            raise self._damaged(f"it holds token {last}, but the tokenizer has {self.vocab_size}")
        told_apart = [torch.from_numpy(x) for x in documents] if self.packed_documents else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), told_apart)

    def _ends_within(self, part: str, start: int) -> np.ndarray:
        """How many tokens of the window from ``start`` on precede each end of a document in it, from 1 to T."""
        ends = self.ends[part]
        first, last = np.searchsorted(ends, [start, start + self.sequence_length], side="right")
        within = np.asarray(ends[first:last]) - start
        bounds = np.concatenate([[0], within])
        if (np.diff(bounds) <= 0).any() or bounds[-1] > self.sequence_length:  # kernels trust these as well
            raise self._damaged("the ends of its documents are not in order")
        return within

    def _damaged(self, why: str) -> ValueError:
        return ValueError(
            f"the token cache {self.cache.path} is damaged: {why}; delete it, and it is built again"
        )

    def validation_entropies(self) -> dict[str, float]:
        """What a model of token counts alone would reach on the validation text, in nats a token.

        "unigram": H(x). "bigram": H(x | the token before it), only for byte tokens. Both are estimated on the
        validation text itself.
        """
        tokens = self.tokens["validation"]
        singles = np.zeros(self.vocab_size, np.int64)
        pairs = np.zeros(self.vocab_size**2 if self.vocab_size <= 256 else 0, np.int64)
        for start in range(0, len(tokens), ENTROPY_CHUNK):
            chunk = tokens[start : start + ENTROPY_CHUNK + 1].astype(np.int64)
            singles += np.bincount(chunk[:ENTROPY_CHUNK], minlength=self.vocab_size)
            if len(pairs):
                pairs += np.bincount(chunk[:-1] * self.vocab_size + chunk[1:], minlength=len(pairs))
        entropies = {"unigram": _entropy(singles)}
        if len(pairs):
            befores = pairs.reshape(self.vocab_size, -1).sum(1)
            entropies["bigram"] = _entropy(pairs) - _entropy(befores)
        return entropies


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def open_data(data: DataConfig, sequence_length: int, seed: int, packed_documents: bool = False) -> TokenData:
    """The data of a run, tokenised first where its cache is missing or old."""
    tokenizer = open_tokenizer(data.tokenizer, data.special_tokens)
    return TokenData(prepare_cache(data, tokenizer), tokenizer, sequence_length, seed, packed_documents)
