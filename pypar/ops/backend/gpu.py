"""What GPU kernels take, and where Triton's run: on GPU tensors, or on CPU tensors under its interpreter."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pypar.kernels.launch import launches_go_elsewhere

OLDEST_CAPABILITY = (8, 0)  # asynchronous copies, bf16 products
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_missing() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules says that it is not to be imported
        found = False
    return None if found else "triton is not installed (pip install 'pypar-torch[triton]')"


# Looked up once: torch.compile cannot trace it, and Triton looks at the variable when kernels are imported.
TRITON_MISSING = _triton_missing()


def triton_refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Why Triton's kernels cannot take x, whose dtype they compute in, with `others`; or None."""
    if reason := dtype_refusal(x.dtype):
        return reason
    for tensor in (x, *others):
        if tensor is not None and (reason := triton_device_refusal(tensor.device)):
            return reason
    return None


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Why no GPU kernel computes with this dtype, or None."""
    if dtype in _DTYPES:
        return None
    return f"{str(dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"


def triton_device_refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, or None."""
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if device.type == "cuda":
        return gpu_refusal(device)
    # What torch.compile traces is for other calls too, and it cannot trace the context that launches are sent by.
    if device.type == "cpu" and (_INTERPRETED or (not is_compiling() and launches_go_elsewhere())):
        return None
    if device.type == "cpu":
        return "it runs on a GPU, and a tensor is on the CPU (TRITON_INTERPRET=1 interprets it there, slowly)"
    return f"it runs on a GPU, and a tensor is on {device}"


def gpu_refusal(device: torch.device) -> str | None:
    """Why pypar's kernels cannot run on this GPU, or None."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
