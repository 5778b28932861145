"""Models assembled from pypar's layers."""

from .decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
