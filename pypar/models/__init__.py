"""Models assembled from pypar's layers."""

from .decoder import Decoder, DecoderConfig
from .sequences import ContextParallel, Sequences

__all__ = ["ContextParallel", "Decoder", "DecoderConfig", "Sequences"]
