"""What was built, what this machine can run, and which backend of which operator takes what.

The support table is made by asking: every operator module of pypar.ops is found by being there, and every
backend's `unsupported` is called with tensors that have a device and a dtype but no memory.
"""

from __future__ import annotations

import importlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pypar
from pypar.comm.allreduce.peers import ENGINES, MAX_RANKS
from pypar.comm.allreduce.thresholds import choose as choose_thresholds
from pypar.comm.backend import BACKENDS
from pypar.comm.backend import register as register_backend
from pypar.files.disk import background_kind
from pypar.ops import native
from pypar.ops.backend import ENVIRONMENT_VARIABLE, op_modules
from pypar.ops.linear.choice import half_choice, library_choice, processor
from pypar.ops.linear.upcast import HALVES
from pypar.recomputation.operators import COSTLY, NAMES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda")
_NO_GPU = "torch finds no GPU"
_SIZE = 64  # of every dimension and count that a backend is asked about: an ordinary one
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # of arguments, without names


def main() -> int:
    """Prints the report; returns the exit code, 0 also where parts are missing."""
    for line in [
        *machine_lines(),
        *distributed_lines(),
        "",
        *linear_lines(),
        *recompute_lines(),
        *disk_lines(),
        *all_reduce_lines(),
        "",
        *support_lines(),
    ]:
        print(line)
    return 0


def disk_lines() -> Iterator[str]:
    """How optimizer states would travel to a disk."""
    yield f"files in the background (memory.offload): by {background_kind()}, in files without a name"


def machine_lines() -> Iterator[str]:
    """Versions, processor, native module, accelerators."""
    yield f"pypar {pypar.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    yield f"machine: {platform.machine()}, processor vendor {processor().vendor}, {torch.get_num_threads()} threads"
    missing = native.missing()
    if missing is None:
        module = native.module()
        isas = ", ".join(module.supported_isas())
        yield f"native module: {module.__file__}"
        yield f"instruction sets of this CPU: {isas}; in use: {module.selected_isa()}"
    else:
        yield f"native module: none, {missing}"
    try:
        cuda = importlib.import_module("pypar._cuda")
    except ImportError as error:
        yield f"CUDA module: none ({error}); built where nvcc is found, or with PYPAR_CUDA=1"
    else:
        yield f"CUDA module: {cuda.__file__}, for {cuda.architectures}"
    if torch.cuda.is_available():
        yield from (
            f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        )
    else:
        built = torch.version.cuda
        yield f"GPU: none ({f'torch is built for CUDA {built}' if built else 'torch is built without CUDA'})"
    try:
        yield f"triton: {importlib.import_module('triton').__version__}"
    except ImportError as error:
        yield f"triton: none ({error})"


def distributed_lines() -> Iterator[str]:
    """The back ends of torch.distributed, those that were registered with it among them; which of them pypar takes."""
    backend = torch.distributed.Backend
    register_backend()
    known = [name for name in backend.backend_list if name != backend.UNDEFINED]
    there = [name for name in known if torch.distributed.is_backend_available(name)]
    with_devices = (
        f"{name} ({', '.join(devices)})" if (devices := backend.backend_capability.get(name)) else name
        for name in there
    )
    yield f"torch.distributed: {', '.join(with_devices)}"
    absent = [name for name in known if name not in there]
    if absent:
        yield f"torch.distributed is built without: {', '.join(absent)}"
    for device, name in BACKENDS.items():
        reason = _backend_missing(name, device)
        yield f"ranks on {device}: pypar takes {name}{', which is not there: ' + reason if reason else ''}"


def _backend_missing(name: str, device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return _NO_GPU
    if not torch.distributed.is_backend_available(name):
        return "this torch is built without it"
    return native.missing() if name == BACKENDS["cpu"] else None


def linear_lines() -> Iterator[str]:
    """Which library multiplies matrices on the CPU, and why."""
    name, reason = library_choice(processor())
    yield f"linear in fp32 on CPU: {name}; {reason}"
    for dtype in HALVES:
        name, reason = half_choice(dtype)
        yield f"linear in {str(dtype).removeprefix('torch.')} on CPU: {name}; {reason}"


def recompute_lines() -> Iterator[str]:
    """The operators whose results a recomputation may keep, and how activations travel to the host."""
    kept = ", ".join(f"{name}*" if name in COSTLY else name for name in NAMES)
    yield f'recompute, ops of the policy "selective" (* by default): {kept}'
    how = (
        "a stream of each GPU, pinned memory" if torch.cuda.is_available() else "a thread, within one memory"
    )
    yield f"activations on the host (recompute.offload, memory.activation_bytes): by {how}"


def all_reduce_lines() -> Iterator[str]:
    """Which kernels all-reduce between this machine's GPUs, which of these CUDA lets read each other, the sizes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", 0) if count else torch.device("cpu")
    for name, engine in ENGINES.items():
        yield f"all-reduce between GPUs by {name}: {engine.unsupported(device) or 'yes'}"
    if count < 2:
        yield f"peers: {count} GPU{'s' if count != 1 else ''}, and an all-reduce needs two"
        return
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    apart = [f"{i} -> {j}" for i, j in pairs if not torch.cuda.can_device_access_peer(i, j)]
    access = f"no access {', '.join(apart)}" if apart else "access between all"
    yield f"peers: {access}; PeerAllReduce tries a real copy"
    size = min(count, MAX_RANKS)
    for name in ENGINES:
        at = choose_thresholds(device, name, size)
        yield (
            f"all-reduce of {size} GPUs by {name}: one-shot up to {at.one_shot_max_bytes} bytes, two-shot up to "
            f"{at.two_shot_max_bytes}, beyond that the group's own ({at.source})"
        )


def support_lines() -> Iterator[str]:
    """Every operator x backend x device x dtype, then the reasons of the refusals."""
    yield f"Operators (backend= or {ENVIRONMENT_VARIABLE} names a backend, else the first yes runs):"
    rows, reasons = support_table()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"  [{i}] {reason}" for i, reason in enumerate(reasons, 1))


def support_table() -> tuple[list[list[str]], list[str]]:
    """(rows of cells, the first being the header; reasons). A cell is "yes" or "[n]", reason number n."""
    rows = [["operator", "backend", "device", *(str(d).removeprefix("torch.") for d in DTYPES)]]
    reasons: list[str] = []
    for module in op_modules():
        for backend in module.BACKENDS:
            for device in DEVICES:
                cells = []
                for dtype in DTYPES:
                    reason = ask(backend.unsupported, device, dtype)
                    if device == "cuda" and not torch.cuda.is_available():
                        reason = reason or _NO_GPU
                    if reason is not None and reason not in reasons:
                        reasons.append(reason)
                    cells.append("yes" if reason is None else f"[{reasons.index(reason) + 1}]")
                rows.append([module.__name__.rsplit(".", 1)[1], backend.name, device, *cells])
    return rows, reasons


def ask(unsupported: Callable[..., str | None], device: str, dtype: torch.dtype) -> str | None:
    """What a backend answers for tensors of one device and dtype, options at their defaults."""
    arguments: dict[str, object] = {}
    with FakeTensorMode():
        for name, parameter in inspect.signature(unsupported, eval_str=True).parameters.items():
            if parameter.default is not inspect.Parameter.empty or parameter.kind in _ANY_NUMBER:
                continue
            x = torch.empty(1, _SIZE, _SIZE, _SIZE, device=device, dtype=dtype)
            if parameter.annotation is torch.Tensor:
                arguments[name] = x
            elif hasattr(parameter.annotation, "example"):  # a record of an operator's arguments
                arguments[name] = parameter.annotation.example(x)
            elif type(None) in get_args(parameter.annotation):
                arguments[name] = None
            else:  # a size or an option: int, float, bool
                arguments[name] = parameter.annotation(_SIZE)
        return unsupported(**arguments)


if __name__ == "__main__":
    sys.exit(main())
