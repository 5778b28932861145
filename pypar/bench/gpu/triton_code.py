"""Launches of Triton kernels compiled for a GPU that is not there, and what their machine code holds."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pypar.kernels.launch import with_tables

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NEWEST = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def source_of(launch: Any) -> ASTSource:
    """What the JIT would compile for these arguments: types, constants, and which numbers are 16's
    multiples."""
    signature, constants, attributes = {}, {}, {}
    launch = with_tables(launch)
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            whole = "i32" if abs(value) < 2**31 else "i64"
            signature[parameter.name] = "fp32" if isinstance(value, float) else whole
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        aligned = isinstance(number, int) and number % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Any, capability: int) -> Any:
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source_of(launch), target=target, options=launch.options)


@dataclass(frozen=True)
class MachineCode:
    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int  # instructions that move registers to and from memory
    tensor_core: int  # instructions
    names: frozenset[str]  # of the tensor cores' instructions


def machine_code(compiled: Any, folder: Path) -> MachineCode:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", sass)
    return MachineCode(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack_bytes=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        tensor_core=len(found),
        names=frozenset(found),
    )
