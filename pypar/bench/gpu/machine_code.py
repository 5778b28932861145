"""Machine code of compiled kernels, read by cuobjdump without a GPU: registers, stack, instructions, occupancy."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Of a multiprocessor: bytes of shared memory, warps, block slots. All have 65536 registers, given to warps by 256,
# and take 1 KiB of shared memory from every block.
LIMITS = {
    "sm_80": (164 * 1024, 64, 32),
    "sm_90a": (228 * 1024, 64, 32),
    "sm_100a": (228 * 1024, 64, 32),
    "sm_120": (100 * 1024, 48, 24),
}


@dataclass
class Kernel:
    """One kernel of one architecture."""

    symbol: str
    arch: str
    registers: int
    stack: int
    static_shared: int
    code: list[Instruction]


@dataclass
class Instruction:
    address: int
    opcode: str  # with its modifiers, as in "LDSM.16.M88.4"
    guarded: bool  # by a predicate
    target: int | None  # of a branch


def find_tool(name: str) -> str | None:
    """The path of a CUDA binary tool: Triton's own, else the toolkit's."""
    try:
        import triton
    except ImportError:
        return shutil.which(name)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which(name, path=str(folder)) or shutil.which(name)


def run(*command: str, cwd: str | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def read_kernels(library: Path, archs: list[str]) -> Iterator[Kernel]:
    """Every kernel in a shared library or cubin."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError(
            "cuobjdump not found: it comes with Triton (pip install triton) or the CUDA toolkit"
        )
    with tempfile.TemporaryDirectory() as folder:
        run(tool, "-xelf", "all", str(library), cwd=folder)
        for cubin in sorted(Path(folder).iterdir()):
            if not (match := re.search(r"\.(sm_\d+a?)\.cubin$", cubin.name)) or match[1] not in archs:
                continue
            usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", run(tool, "-res-usage", str(cubin))))
            for part in run(tool, "-sass", str(cubin)).split("Function : ")[1:]:
                symbol, text = part.split("\n", 1)
                numbers = dict(re.findall(r"(\w+):(\d+)", usage[symbol.strip()]))
                yield Kernel(
                    symbol.strip(),
                    match[1],
                    int(numbers["REG"]),
                    int(numbers["STACK"]),
                    # From sm_90 on it holds the KiB that every block gives up.
                    int(numbers["SHARED"]) - (0 if match[1] == "sm_80" else 1024),
                    list(_instructions(text)),
                )


def _instructions(text: str) -> Iterator[Instruction]:
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);"
    for address, guard, opcode, operands in re.findall(pattern, text, re.MULTILINE):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if opcode.startswith("BRA") else None
        yield Instruction(
            int(address, 16), opcode, _is_guarded(guard, operands), target and int(target[1], 16)
        )


def _is_guarded(guard: str, operands: str) -> bool:
    """A branch may also carry its predicate as an operand (BRA P0, BRA.U UP0)."""
    return bool(guard) or re.match(r"\s*!?U?P\d\b", operands) is not None


def num_spills(kernel: Kernel) -> int:
    """Instructions that use the stack."""
    return sum(instruction.opcode.split(".")[0] in ("STL", "LDL") for instruction in kernel.code)


def is_tensor(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA")


def resident_blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    shared_bytes, warps, slots = LIMITS[arch]
    block_warps = -(-threads // 32)
    register_units = -(-registers * 32 // 256) * 256 * block_warps
    return min(65536 // register_units, shared_bytes // (shared + 1024), warps // block_warps, slots)
