"""What the GPU backends of attention have in common: the problems that their kernels take."""

from __future__ import annotations

from pypar.ops.attention.arguments import AttentionProblem
from pypar.ops.backend.gpu import dtype_refusal

_LARGEST_HEAD = 256


def refusal(problem: AttentionProblem) -> str | None:
    """Why no GPU kernel takes these types and sizes, or None."""
    q = problem.q
    if reason := dtype_refusal(q.dtype):
        return reason
    for name, size in (("head size", q.shape[-1]), ("value head size", problem.v.shape[-1])):
        if size % 8 or size > _LARGEST_HEAD:
            return f"the {name} ({size}) is not a multiple of 8 up to {_LARGEST_HEAD}"
    return None
