"""The operators of a transformer: one file each, with contract, definition in plain PyTorch and backends."""

from pypar.ops.attention import attention
from pypar.ops.cross_entropy import cross_entropy
from pypar.ops.linear import linear
from pypar.ops.rms_norm import rms_norm
from pypar.ops.rope import rope
from pypar.ops.swiglu import swiglu

__all__ = ["attention", "cross_entropy", "linear", "rms_norm", "rope", "swiglu"]
