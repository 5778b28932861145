"""Attention by Triton: GPU tensors, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from torch import Tensor

from pypar.ops.attention.arguments import AttentionProblem, AttentionResults
from pypar.ops.attention.gpu import refusal
from pypar.ops.backend.gpu import triton_device_refusal

_LARGEST_POSITION = 2**30  # sums of two positions are int32 in the kernels


def forward(problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None) -> AttentionResults:
    """(out, lse); a carry, fp32 (out, lse) over earlier keys, is continued: updated in place and returned."""
    from pypar.kernels.attention import attention_forward

    return AttentionResults(*attention_forward(problem, carry))


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
    from pypar.kernels.attention import attention_backward

    return attention_backward(problem, dout, out, lse, dlse, into, dbias)


def unsupported(problem: AttentionProblem) -> str | None:
    """Why these kernels cannot run the problem, or None. Looks at metadata only."""
    if reason := refusal(problem):
        return reason
    if not _positions_fit(problem):
        return f"a position is beyond {_LARGEST_POSITION}"
    return triton_device_refusal(problem.q.device)


def _positions_fit(problem: AttentionProblem) -> bool:
    at = problem.positions
    T, S = problem.q.shape[-3], problem.k.shape[-3]
    last = [T, S]
    if at is not None:
        last = [abs(at.q_start) + at.step * T, abs(at.k_start) + at.step * S, at.batch_start, at.head_start]
    return max(last) < _LARGEST_POSITION
