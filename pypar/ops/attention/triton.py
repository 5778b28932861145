"""Attention by Triton: GPU tensors, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from pypar.ops.attention.arguments import AttentionProblem, AttentionResults
from pypar.ops.attention.gpu import device_refusal, refusal

_LARGEST_POSITION = 2**30  # sums of two positions are int32 in the kernels


def _triton_missing() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules says that it is not to be imported
        found = False
    return None if found else "triton is not installed (pip install 'pypar-torch[triton]')"


# Looked up once: torch.compile cannot trace it, and Triton looks at the variable when kernels are imported.
TRITON_MISSING = _triton_missing()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
    return _missing(problem.q.device)


def _positions_fit(problem: AttentionProblem) -> bool:
    at = problem.positions
    T, S = problem.q.shape[-3], problem.k.shape[-3]
    last = [T, S]
    if at is not None:
        last = [abs(at.q_start) + at.step * T, abs(at.k_start) + at.step * S, at.batch_start, at.head_start]
    return max(last) < _LARGEST_POSITION


def _missing(device: torch.device) -> str | None:
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if device.type == "cpu":
        if _INTERPRETED:
            return None
        return "it runs on a GPU, and a tensor is on the CPU (TRITON_INTERPRET=1 interprets it there, slowly)"
    if device.type != "cuda":
        return f"it runs on a GPU, and a tensor is on {device}"
    return device_refusal(device)
