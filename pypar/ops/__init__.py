"""The operators of a transformer: one file each, with contract, definition in plain PyTorch and backends.

torch.compile keeps them in its graphs. torch.func.grad, vjp and jacrev differentiate them once, torch.vmap runs them
for one element of the batch after the other; forward mode (jvp, jacfwd, hessian) is refused.
"""

from pypar.ops.attention import attention
from pypar.ops.cross_entropy import cross_entropy
from pypar.ops.gated import clamped_swiglu, geglu, swiglu
from pypar.ops.grouped_matmul import grouped_matmul
from pypar.ops.layer_norm import LayerNorm, layer_norm
from pypar.ops.linear import linear
from pypar.ops.linear_cross_entropy import linear_cross_entropy
from pypar.ops.merge_attention import merge_attention
from pypar.ops.moe_permute import moe_combine, moe_permute
from pypar.ops.rms_norm import RMSNorm, rms_norm
from pypar.ops.rope import rope, rope_frequencies, rope_tables

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "attention",
    "clamped_swiglu",
    "cross_entropy",
    "geglu",
    "grouped_matmul",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "moe_combine",
    "moe_permute",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "swiglu",
]
