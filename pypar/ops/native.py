"""The thin Python side of the native module: loading it, its instruction set, its threads.

The instruction set is the best that the CPU has; the environment variable PYPAR_ISA (baseline, avx2, avx512,
avx512_bf16; neon) names a poorer one, for tests and comparisons. Threads are those of torch: as many as
`torch.get_num_threads()`, from the OpenMP pool that torch itself uses.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ISA_VARIABLE = "PYPAR_ISA"

# ElementType in csrc/registry.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

num_threads = torch.get_num_threads


@functools.cache
def module() -> ModuleType:
    """The native module, ready to run.

    ImportError when it was not built; ValueError when PYPAR_ISA names an instruction set that this CPU lacks.
    """
    try:
        from pypar import _native
    except ImportError as error:
        raise ImportError(
            f"pypar's native module does not load ({error}); build it with `pip install -e .` in the source folder"
        ) from error
    _native.set_parallel_entry(_torch_parallel_entry())
    if isa := os.environ.get(ISA_VARIABLE):
        try:
            _native.select_isa(isa)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    return _native


def dtype_code(x: Tensor) -> int:
    """The native module's number for x's dtype."""
    return _DTYPE_CODES[x.dtype]


def refusal(*tensors: Tensor) -> str | None:
    """Why the native kernels cannot take these tensors, or None: they must lie in CPU memory, in one known dtype."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on the CPU, and a tensor is on {x.device}"
        if x.dtype not in _DTYPE_CODES:
            return f"{_plain(x.dtype)} is not one of float32, bfloat16, float16"
    return missing()


@functools.cache
def missing() -> str | None:
    """Why there is no native module, or None."""
    try:
        module()
    except ImportError as error:
        return str(error)
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_parallel_entry() -> int:
    """The address of GOMP_parallel in the libgomp that torch has loaded, or 0 where it has none."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looking a name up in a library also looks in those that it was linked with.
        entry = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0
