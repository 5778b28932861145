"""bucket in Triton: scaled and converted in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches

_BLOCK = 2048  # elements of a program: 16 for each of 128 threads


def forward(src: Tensor, scale: float, out: Tensor) -> None:
    """out = src * scale, both contiguous; src may be out."""
    size = src.numel()
    arguments = {"src_ptr": src, "out_ptr": out, "scale": scale, "size": size, "BLOCK": _BLOCK}
    run_launches([Launch(_bucket_kernel, triton.cdiv(size, _BLOCK), arguments, 4, 1)], src)


@triton.jit(do_not_specialize=["size"])
def _bucket_kernel(src_ptr, out_ptr, scale, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(src_ptr + at, mask=at < size, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < size)
