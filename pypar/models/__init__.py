"""Models assembled from pypar's layers."""

from pypar.models.decoder import Decoder, DecoderConfig
from pypar.models.sequences import ContextParallel, Sequences

__all__ = ["ContextParallel", "Decoder", "DecoderConfig", "Sequences"]
