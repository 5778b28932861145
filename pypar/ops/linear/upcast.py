"""Products of bf16 and fp16 in fp32, where the processor has no instructions for 16 bits.

A product of two such numbers has no more digits than fp32 holds, so nothing is lost by converting them first; sums are
fp32 and are rounded once. On processors without AVX-512 torch 2.13 multiplies 16 bits by loops of its own: at 20
GFLOP/s in bf16 and 5 to 25 in fp16 on two cores of a Zen 3, where its fp32 product makes 180, and this one 160.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.linear.library import from_product, no_gain

# Of fp32 copies, so that large operands are never copied whole. At 1024 features 1024 rows are converted at once, which
# is as fast as any other number from 512 on.
_COPY_BYTES = 4 << 20
_MIN_ROWS = 8  # below, converting weights takes longer than torch's loops
HALVES = (torch.bfloat16, torch.float16)


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch multiplies CPU tensors of 16 bits by oneDNN, as it does where the processor has what that needs."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    asks = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    return asks is not None and asks()


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, K] @ b.T [K, O] + bias."""
    out = a.new_empty(a.shape[0], b.shape[0])
    rows = max(1, _COPY_BYTES // (4 * max(1, a.shape[1])))
    for into, part in zip(out.split(rows), a.split(rows), strict=True):
        wide = part.float()
        for begin in range(0, b.shape[0], rows):
            of = slice(begin, begin + rows)
            into[:, of] = torch.nn.functional.linear(
                wide, b[of].float(), None if bias is None else bias[of].float()
            )
    return out


def _unsupported(x: Tensor, in_features: int, out_features: int) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, which multiplies 16 bits itself"
    if x.dtype not in HALVES:
        return f"x is {x.dtype}; only bfloat16 and float16 have fewer bits than fp32"
    return no_gain(x, in_features, out_features, min_rows=_MIN_ROWS)


UPCAST = from_product("upcast", _product, _unsupported)
