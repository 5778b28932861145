"""The thin Python side of the native module: loading it, its instruction set, its threads.

Tensors reach native code through `run` alone, which passes their addresses.

The instruction set is the best that the CPU has; the environment variable PYPAR_ISA (baseline, avx2, avx512,
avx512_bf16, amx, amx_fp16; neon) names a lower one, for tests and comparisons. Threads are those of torch: as many as
`torch.get_num_threads()`, from the OpenMP pool that torch itself uses.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pypar.ops.uncompiled import uncompiled

ISA_VARIABLE = "PYPAR_ISA"

# ElementType in csrc/core/registry.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_BUILD_CUDA = "`pip install -e .` in the source folder builds it where nvcc is on PATH"

num_threads = torch.get_num_threads


@functools.cache
def module() -> ModuleType:
    """The native module, ready to run.

    ImportError when it was not built; ValueError when PYPAR_ISA names an instruction set that this CPU lacks.
    """
    try:
        native = importlib.import_module("pypar._native")
    except ImportError as error:
        raise ImportError(
            f"the native module does not load ({error}); `pip install -e .` in the source folder builds it"
        ) from error
    native.set_parallel_entry(_torch_parallel_entry())
    if isa := os.environ.get(ISA_VARIABLE):
        try:
            native.select_isa(isa)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    return native


@functools.cache
def cuda_module() -> ModuleType:
    """The module of CUDA kernels. ImportError when it was not built. It loads on a machine without a driver."""
    try:
        return importlib.import_module("pypar._cuda")
    except ImportError as error:
        raise ImportError(f"the CUDA module does not load ({error}); {_BUILD_CUDA}") from error


@uncompiled("a native function reads and writes memory, which a graph does not see")
def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), where native code gets the address in place of each tensor, also within tuples and dicts.

    The tensors are held until it returns: a graph of torch.compile that was given addresses would free what
    they point to. ValueError as `address` has it.
    """
    return function(*map(_with_addresses, arguments))


def address(x: Tensor) -> int:
    """Where the elements of x begin in memory, 0 where it has none. Whoever uses it keeps x alive meanwhile.

    ValueError: x has no memory of its own (it stands for one in torch.compile, torch.export, FakeTensorMode or
    torch.func; it is sparse or a DTensor), or what its memory holds is yet to be negated or conjugated.
    """
    try:
        found = x.data_ptr()
    except RuntimeError:  # says that there is no storage
        found = 0
    if not found and x.numel():
        raise ValueError(
            f"a {type(x).__name__} of shape {tuple(x.shape)} has no memory that native code could read or write: it is "
            "only traced (torch.compile, torch.export, FakeTensorMode, torch.func), or sparse, or a DTensor; call "
            "the functions of pypar.ops, which torch can trace, or pass a plain tensor (of a DTensor its to_local())"
        )
    if x.is_neg() or x.is_conj():
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} is a view whose elements are negated or conjugated as they are read, "
            "and native code would read them as they lie; pass x.resolve_neg().resolve_conj()"
        )
    return found


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """`address` of each of many tensors, in a third of the time; they are to be kept alive as with `address`."""
    try:
        found = [x.data_ptr() for x in tensors]
    except RuntimeError:
        found = [0]
    if all(found) and not any(x.is_neg() or x.is_conj() for x in tensors):
        return found
    return [address(x) for x in tensors]


def _with_addresses(value: Any) -> Any:
    kind = type(value)
    if kind is int or kind is float or kind is bool or value is None:
        return value
    if kind is tuple:
        return tuple(map(_with_addresses, value))
    if kind is dict:
        return {name: _with_addresses(x) for name, x in value.items()}
    return address(value) if isinstance(value, Tensor) else value


def dtype_code(x: Tensor) -> int:
    """The native module's number for x's dtype."""
    return _DTYPE_CODES[x.dtype]


@functools.cache
def missing() -> str | None:
    """Why there is no native module, or None."""
    try:
        module()
    except ImportError as error:
        return str(error)
    return None


def cuda_missing() -> str | None:
    """Why there are no CUDA kernels, or None. Looks for their module without loading it: it is large."""
    if importlib.util.find_spec("pypar._cuda") is not None:
        return None
    return f"the CUDA module is not built; {_BUILD_CUDA}"


def _torch_parallel_entry() -> int:
    """The address of GOMP_parallel in the libgomp that torch has loaded, or 0 where it has none."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looking a name up in a library also looks in those that it was linked with.
        entry = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0
