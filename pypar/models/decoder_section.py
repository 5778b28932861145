"""What a run's configuration says about the decoder: the section ``model`` where its family is "decoder"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pypar.models.family import ModelSection
from pypar.settings import Run, setting
from pypar.tensor_parallel.config import check_cut

if TYPE_CHECKING:
    from pypar.models.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class DecoderSection(ModelSection):
    """Sizes of the decoder; every number is the whole model's, never one rank's."""

    vocab_size: int = setting(0, at_least=0, help="tokens of the vocabulary; 0: the tokenizer's")
    num_layers: int = setting(4, at_least=1, help="layers")
    d_model: int = setting(256, at_least=1, help="width of the hidden state")
    num_heads: int = setting(4, at_least=1, help="query heads")
    num_kv_heads: int = setting(2, at_least=1, help="key/value heads")
    head_size: int = setting(0, at_least=0, help="width of a head; 0: d_model / num_heads")
    d_ff: int = setting(704, at_least=1, help="width of the feed-forward part")
    rope_theta: float = setting(10000.0, above=0, help="base of the rotary embedding's wavelengths")
    norm_eps: float = setting(1e-5, above=0, help="what is added to the mean square in a norm")
    tied_embeddings: bool = setting(False, help="the embedding's weight is also the head's")

    def check(self, run: Run) -> Sequence[str]:
        """What tensor parallelism cuts must divide; asked of sizes that are filled in."""
        cut = ("num_heads", "num_kv_heads", "vocab_size", "d_ff")
        check_cut("model", {name: getattr(self, name) for name in cut}, run)
        return ()

    def filled(self, vocab_size: int) -> DecoderSection:
        """The section with vocab_size (the tokenizer's is given) and head_size filled in where they are 0."""
        head_size = self.head_size
        if head_size == 0:
            if self.num_heads < 1 or self.d_model % self.num_heads:
                raise ValueError(
                    f"model.d_model ({self.d_model}) must divide by model.num_heads ({self.num_heads}) where "
                    "model.head_size is not given; set model.head_size or change either"
                )
            head_size = self.d_model // self.num_heads
        if self.vocab_size and self.vocab_size < vocab_size:
            raise ValueError(
                f"model.vocab_size ({self.vocab_size}) must be at least the tokenizer's ({vocab_size}); use 0 "
                "to take the tokenizer's"
            )
        return dataclasses.replace(self, head_size=head_size, vocab_size=self.vocab_size or vocab_size)

    def sizes(self, vocab_size: int) -> DecoderConfig:
        """The decoder's sizes with every 0 filled in; ``vocab_size`` is the tokenizer's."""
        from pypar.models.decoder import DecoderConfig

        values = dataclasses.asdict(self.filled(vocab_size))
        return DecoderConfig(
            **{field.name: values[field.name] for field in dataclasses.fields(DecoderConfig)}
        )

    def model_class(self) -> type[Decoder]:
        from pypar.models.decoder import Decoder

        return Decoder
