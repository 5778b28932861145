"""Models for one device, assembled from pypar's layers; `pypar.parallelize` spreads them.

Names are loaded when they are first used: a configuration is checked without torch.
"""

from typing import TYPE_CHECKING

from pypar.lazy import loader

if TYPE_CHECKING:
    from pypar.models.decoder import Decoder, DecoderConfig
    from pypar.models.layers import CausalAttention, Head, Linear, Positions, RMSNorm
    from pypar.sequences import Sequences

__all__ = [
    "CausalAttention",
    "Decoder",
    "DecoderConfig",
    "Head",
    "Linear",
    "Positions",
    "RMSNorm",
    "Sequences",
]

__getattr__ = loader(
    __name__,
    {
        **dict.fromkeys(("Decoder", "DecoderConfig"), "pypar.models.decoder"),
        **dict.fromkeys(("CausalAttention", "Head", "Linear", "Positions", "RMSNorm"), "pypar.models.layers"),
        "Sequences": "pypar.sequences",
    },
    __all__,
)
