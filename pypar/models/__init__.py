"""Models for one device, assembled from pypar's layers; `pypar.parallelize` spreads them."""

from pypar.models.decoder import Decoder, DecoderConfig
from pypar.models.layers import CausalAttention, Linear, Positions, RMSNorm
from pypar.sequences import Sequences

__all__ = ["CausalAttention", "Decoder", "DecoderConfig", "Linear", "Positions", "RMSNorm", "Sequences"]
