"""Attention by the CUDA kernels of csrc/attention*.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops import attention_native, native
from pypar.ops.attention_arguments import AttentionProblem
from pypar.ops.attention_native import aligned, with_aligned_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_OLDEST_CAPABILITY = (8, 0)  # asynchronous copies, bf16 products
_MISSING = native.cuda_missing()  # looked up once, since torch.compile cannot trace it


def forward(problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """(out, lse); a carry, fp32 (out, lse) over earlier keys, is continued: updated in place and returned."""
    with torch.cuda.device(problem.q.device):
        return attention_native.forward(native.cuda_module(), with_aligned_rows(problem), carry)


def backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), or, given fp32 tensors to add `into`, these. dbias: as in attention_reference.backward."""
    with torch.cuda.device(problem.q.device):
        return attention_native.backward(
            native.cuda_module(),
            with_aligned_rows(problem),
            aligned(dout),
            aligned(out),
            lse,
            dlse,
            into,
            dbias,
        )


def unsupported(problem: AttentionProblem) -> str | None:
    """Why these kernels cannot run the problem, or None. Looks at metadata only."""
    q = problem.q
    if q.device.type != "cuda":
        return f"it runs on an NVIDIA GPU, and a tensor is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
    for name, size in (("head size", q.shape[-1]), ("value head size", problem.v.shape[-1])):
        if size % 8 or size > _LARGEST_HEAD:
            return f"the {name} ({size}) is not a multiple of 8 up to {_LARGEST_HEAD}"
    if _MISSING is not None:
        return _MISSING
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.cuda.get_device_capability(q.device) < _OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(q.device)} is older than compute capability 8.0"
    return None
