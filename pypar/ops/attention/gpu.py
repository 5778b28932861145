"""What the GPU backends of attention have in common: the problems that their kernels take."""

from __future__ import annotations

import torch

from pypar.ops.attention.arguments import AttentionProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
OLDEST_CAPABILITY = (8, 0)  # asynchronous copies, bf16 products


def refusal(problem: AttentionProblem) -> str | None:
    """Why no GPU kernel takes these types and sizes, or None."""
    q = problem.q
    if q.dtype not in _DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
    for name, size in (("head size", q.shape[-1]), ("value head size", problem.v.shape[-1])):
        if size % 8 or size > _LARGEST_HEAD:
            return f"the {name} ({size}) is not a multiple of 8 up to {_LARGEST_HEAD}"
    return None


def device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU, or None."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
