"""Attention's CUDA kernels as compiled PTX, run by ptxrun (see its README): what their host code does, in Python."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pypar.bench.gpu.machine_code import find_tool
from pypar.ops import native
from pypar.ops.attention import native as attention_native
from pypar.ops.attention.arguments import AttentionProblem
from tests import ROOT

CSRC = ROOT / "csrc"
KERNELS = {  # what the names of a source's kernels hold
    "attention/cuda/forward.cu": "attention_forward",
    "attention/cuda/backward.cu": "attention_backward",
    "allreduce/launch.cu": "allreduce",
}
WORK_BYTES = 64


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure of "type name name, type name"; type: p pointer, l int64, i int, u uint32, f float, b bool."""
    types = {
        "p": ctypes.c_void_p,
        "l": ctypes.c_int64,
        "i": ctypes.c_int,
        "u": ctypes.c_uint32,
        "f": ctypes.c_float,
        "b": ctypes.c_bool,
    }
    members = []
    for group in fields.split(","):
        kind, *names = group.split()
        members += [(member, types.get(kind) or globals()[kind]) for member in names]
    return type(name, (ctypes.Structure,), {"_fields_": members})


# As in csrc/attention/arguments.h and csrc/attention/cuda/forward_work.cuh.
CTensor = _structure("CTensor", "p data, l batch_stride position_stride head_stride element_stride, i dtype")
CBias = _structure("CBias", "p data, l batch_stride head_stride query_stride key_stride, i dtype")
CProblem = _structure(
    "CProblem",
    "l B T S N G H Hv, CTensor q k v, p cu_seqlens_q cu_seqlens_k, f scale softcap, l left right, b bottom_right,"
    "l q_start k_start step batch_start head_start, CBias bias, p sinks alibi_slopes, l alibi_batch_stride,"
    "f dropout_p, u dropout_threshold, p seed, i num_threads, p stream",
)
CForward = _structure("CForward", "CProblem problem, CTensor out, p lse lse_rest, b carry, p memory left_out")
CSchedule = _structure("CSchedule", "i blocks_per_head num_splits, p partial_out partial_lse, l num_rows")


def c_problem(problem: AttentionProblem) -> CProblem:
    """The structure that the binding makes of the same dict."""
    result = CProblem()
    for name, value in native.run(dict, attention_native._problem(problem)).items():
        if name in ("q", "k", "v"):
            value = CTensor(value[0], *value[1], value[2])
        elif name == "bias":
            value = CBias() if value is None else CBias(value[0], *value[1], value[2])
        setattr(result, name, value)
    return result


def c_tensor(x: Tensor) -> CTensor:
    address, strides, dtype = native.run(tuple, attention_native._tensor(x))
    return CTensor(address, *strides, dtype)


@functools.lru_cache(maxsize=1)
def _module_class() -> type:
    import ptxrun

    class ModuleOfStructures(ptxrun.Module):
        """Arguments may be ctypes structures; the addresses of `buffers` in them become the machine's."""

        buffers: dict[int, tuple[str, Tensor]] = {}

        def _pack(self, kernel, arguments, memory, image):
            moved = {}
            for address, (name, x) in self.buffers.items():
                span = x.element_size() * (
                    1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                )
                moved[address] = memory.add_span(name, address, span if x.numel() else 0, 0, keep=x).base
            packed = [_with_addresses(a, moved) if isinstance(a, ctypes.Structure) else a for a in arguments]
            return super()._pack(kernel, packed, memory, image)

    return ModuleOfStructures


def _with_addresses(structure: ctypes.Structure, moved: dict[int, int]) -> bytes:
    copy = type(structure).from_buffer_copy(structure)
    _move(copy, moved)
    return bytes(copy)


def _move(structure: ctypes.Structure, moved: dict[int, int]) -> None:
    for name, kind in structure._fields_:
        value = getattr(structure, name)
        if kind is ctypes.c_void_p and value:
            setattr(structure, name, moved[value])
        elif isinstance(value, ctypes.Structure):
            _move(value, moved)


@functools.lru_cache
def _ptx(source: str) -> str:
    """The PTX of csrc/<source>: what pypar._cuda holds, if it was built with PTX for compute_80, else nvcc's anew."""
    with tempfile.TemporaryDirectory() as folder:
        tool, module = find_tool("cuobjdump"), importlib.util.find_spec("pypar._cuda")
        if tool is not None and module is not None and module.origin is not None:
            subprocess.run([tool, "-xptx", "all", module.origin], check=True, cwd=folder, capture_output=True)
        entries = KERNELS[source]
        for path in sorted(Path(folder).glob("*.sm_80.ptx")):
            if re.search(rf"\.entry \w*{entries}", text := path.read_text()):
                return text
        nvcc, target = shutil.which("nvcc"), Path(folder) / "kernels.ptx"
        assert nvcc is not None
        command = [nvcc, "-std=c++17", "-O3", "-ptx", "-arch=compute_80", f"-I{CSRC}", str(CSRC / source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return target.read_text()


@functools.lru_cache
def _kernel(source: str, ptxrun_folder: str, mark: str) -> tuple[Any, str]:
    """(module, name) of the kernel whose name holds `mark`; the others are left out, as each takes half a second."""
    if ptxrun_folder not in sys.path:
        sys.path.append(ptxrun_folder)
    head, *kernels = re.split(r"^(?=(?:\.visible )?\.entry )", _ptx(source), flags=re.MULTILINE)
    names = [re.search(r"\.entry (\w+)", kernel)[1] for kernel in kernels]
    ((name, text),) = (found for found in zip(names, kernels, strict=True) if re.search(mark, found[0]))
    return _module_class()(head + text), name


@dataclass
class Launcher:
    """Launches csrc/<source>'s kernels. buffers: all tensors whose addresses stand in their arguments, by name."""

    source: str
    folder: str  # that holds ptxrun
    buffers: dict[str, Tensor]

    def launch(
        self,
        mark: str,
        blocks: int,
        threads: int,
        arguments: tuple,
        shared_bytes: int = 0,
        **options,
    ) -> None:
        """The kernel whose name holds `mark`, a regular expression; options go to ptxrun's launch."""
        module, kernel = _kernel(self.source, self.folder, mark)
        module.buffers = {x.data_ptr(): (name, x) for name, x in self.buffers.items() if x.numel()}
        checks = {"race": "raise", "uninit": "raise", "max_shared": 232448} | options
        module.launch(kernel, (blocks,), (threads,), arguments, shared_bytes, **checks)


@dataclass
class Shape:
    """One instance of the forward kernel: its name holds `mark`."""

    mark: str
    threads: int
    rows: int
    keys: int
    shared_bytes: int


def forward_shape(problem: AttentionProblem) -> Shape:
    """Which instance csrc/attention/cuda/forward.cu takes, and the sizes that forward_work.cuh gives it."""
    T, N, H = problem.q.shape[-3:]
    G, Hv = problem.v.shape[-2:]
    head = next(size for size in (64, 128, 256) if max(H, Hv) <= size)
    if problem.q.dtype == torch.float32:
        keys = 16 if head == 256 else 32
        shared = 64 * (head + 4) * 4 + keys * (head + 4) * 4 + 64 * (keys + 4) * 4 + WORK_BYTES + 64 * 4
        return Shape(f"Float32ShapeILi{head}E", 256, 64, keys, shared)
    few = 16 * (problem.num_sequences if problem.varlen else 1) >= T * (N // G)
    options = (problem.softcap, problem.bias is not None, problem.alibi_slopes is not None, problem.dropout_p)
    modified = any(options) or not 1e-20 < problem.scale < 1e20 or few
    rows = 16 if few else 64 if head == 256 else 128
    keys = 32 if not few and head >= (128 if modified else 256) else 64
    stages = 4 if head == 64 else 2 if head == 256 and few else 3
    tag = "11BFloat16Tag" if problem.q.dtype == torch.bfloat16 else "10Float16Tag"
    shared = (rows + stages * keys) * head * 2 + WORK_BYTES + rows * 4
    return Shape(f"{tag}ELi{head}ELb{few:d}ELb{modified:d}E", 128, rows, keys, shared)


def forward_schedule(problem: AttentionProblem, shape: Shape, num_splits: int) -> tuple[CSchedule, int]:
    """(schedule, thread blocks)"""
    T, N = problem.q.shape[-3:-1]
    S, G = problem.v.shape[-3:-1]
    B = problem.num_sequences
    per_head = -(-T * (N // G) // shape.rows) + (B if problem.varlen else 0)
    schedule = CSchedule(per_head, num_splits, None, None, (1 if problem.varlen else B) * N * T)
    return schedule, per_head * G * (1 if problem.varlen else B) * num_splits


def run_forward(
    folder: str,
    problem: AttentionProblem,
    carry: tuple[Tensor, Tensor] | None = None,
    num_splits: int = 1,
    **options,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the compiled kernel; options go to ptxrun's launch."""
    if carry is None:
        out = torch.full(problem.out_shape, torch.nan, dtype=problem.q.dtype)
        lse = torch.full(problem.lse_shape, torch.nan)
    else:
        out, lse = carry
    shape = forward_shape(problem)
    schedule, blocks = forward_schedule(problem, shape, num_splits)
    partial_out = torch.full((num_splits, schedule.num_rows, problem.v.shape[-1]), torch.nan)
    partial_lse = torch.full((num_splits, schedule.num_rows), torch.nan)
    schedule.partial_out, schedule.partial_lse = partial_out.data_ptr(), partial_lse.data_ptr()
    arguments = CForward(c_problem(problem), c_tensor(out), lse.data_ptr(), None, carry is not None)
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, Tensor)}
    tensors |= {"out": out, "lse": lse, "partial_out": partial_out, "partial_lse": partial_lse}
    for null in (x for x in (arguments.problem.q, arguments.problem.k, arguments.problem.v) if not x.data):
        null.data = None
    launcher, values = Launcher("attention/cuda/forward.cu", folder, tensors), (arguments, schedule)
    launcher.launch(shape.mark, blocks, shape.threads, values, shape.shared_bytes, **options)
    if num_splits > 1:
        launcher.launch("attention_combine", -(-schedule.num_rows * 32 // 128), 128, values, **options)
    return out, lse
