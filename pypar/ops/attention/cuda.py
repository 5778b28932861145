"""Attention by the CUDA kernels of csrc/attention/cuda/."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.attention import native as attention_native
from pypar.ops.attention.arguments import AttentionProblem, AttentionResults
from pypar.ops.attention.gpu import refusal
from pypar.ops.attention.native import aligned, with_aligned_rows
from pypar.ops.backend.gpu import gpu_refusal

_MISSING = native.cuda_missing()  # looked up once, since torch.compile cannot trace it


def forward(problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None) -> AttentionResults:
    """(out, lse); a carry, fp32 (out, lse) over earlier keys, is continued: updated in place and returned."""
    with torch.cuda.device(problem.q.device):
        found = attention_native.forward(native.cuda_module(), with_aligned_rows(problem), carry)
    return AttentionResults(*found)


def backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None,
    dbias: Tensor | None,
    lse_rest: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), or, given fp32 tensors to add `into`, these. dbias and lse_rest as the reference has them."""
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
    if reason := refusal(problem):
        return reason
    if _MISSING is not None:
        return _MISSING
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    return gpu_refusal(q.device)
