"""What the compiled GPU kernels promise, read from pypar._cuda without a GPU: a markdown table per architecture.

    python bench/gpu_report.py [--arch sm_80 ...] [--kernel head 128 bf16]

Needs pypar._cuda (nvcc at installation) and Triton's wheel, for its cuobjdump.

registers, spills   of a thread; spills are counted in the machine code (STL and LDL instructions) and as stack bytes
shared              bytes of a block, dynamic and static
blocks              that one multiprocessor holds at once: the least of what registers, shared memory, warps and
                    block slots allow (LIMITS, from NVIDIA's occupancy tables)
The rest is counted on one turn of the main loop, the innermost that holds tensor-core instructions. Of all paths
through it the one with most of these, and then with the fewest others, is taken: a block of keys that is seen
whole and does not raise any row's maximum by much.
tensor, other       instructions of a warp: mma.sync m16n8k16 (HMMA), all others
shared reads        ldmatrix (LDSM), as matrices of 8x8
tensor share        the most of its time that the tensor pipe can be busy: with a = tensor * TENSOR_CYCLES, the cycles
                    that the pipe of one of the four schedulers needs, it is a / max(a, issue, reads, powers), where
                    issue = tensor + other       a scheduler issues one instruction a cycle
                    reads = 4 * matrices         a matrix is 128 bytes, one cycle of shared memory, which four share
                    powers = 8 * MUFU            4 lanes a cycle and scheduler
                    It is a bound from counted instructions, not a measurement: it knows nothing of latencies.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
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
# Cycles of a scheduler's tensor pipe for one m16n8k16, 2048 multiply-adds, from the dense bf16 rates with fp32 sums
# that NVIDIA states: A100 312, H100 989, RTX 5090 209.5 TFLOP/s. sm_100's tensor memory is out of mma.sync's reach;
# it is taken to be as fast as sm_90 without.
TENSOR_CYCLES = {"sm_80": 8, "sm_90a": 4, "sm_100a": 4, "sm_120": 32}


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
        sys.exit("cuobjdump not found: it comes with Triton (pip install triton) or the CUDA toolkit")
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


class Flow:
    """Basic blocks of a kernel and which follow which."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        index = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.target in index:
                starts |= {i + 1, index[instruction.target]}
            elif instruction.opcode.split(".")[0] in ("EXIT", "RET", "BRX"):
                starts.add(i + 1)
        self.starts = sorted(start for start in starts if start < len(code))
        ends = [*self.starts[1:], len(code)]
        self.blocks = {start: code[start:end] for start, end in zip(self.starts, ends, strict=True)}
        self.successors = {s: self._following(s, e, index) for s, e in zip(self.starts, ends, strict=True)}

    def _following(self, start: int, end: int, index: dict[int, int]) -> list[int]:
        last = self.code[end - 1]
        following = [index[last.target]] if last.target in index else []
        leaves = last.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "BRA")
        if end < len(self.code) and (last.guarded or not leaves):
            following.append(end)
        return following

    def loops(self) -> Iterator[tuple[int, set[int]]]:
        """(head, blocks) of every loop: the blocks from which a branch back to the head can be reached without it."""
        before: dict[int, list[int]] = {start: [] for start in self.starts}
        for start, following in self.successors.items():
            for other in following:
                before[other].append(start)
        for tail, following in self.successors.items():
            for head in (other for other in following if other <= tail):
                inside, waiting = {head}, [tail]
                while waiting:
                    block = waiting.pop()
                    if block not in inside:
                        inside.add(block)
                        waiting += before[block]
                yield head, inside

    def hot_path(self) -> list[Instruction]:
        """One turn of the innermost loop with tensor-core instructions; empty without such a loop."""
        candidates = [
            (len(inside), head, inside)
            for head, inside in self.loops()
            if any(is_tensor(i) for block in inside for i in self.blocks[block])
        ]
        if not candidates:
            return []
        _, head, inside = min(candidates, key=lambda c: c[:2])
        # Blocks lie in the order of their addresses; a branch back inside is another loop and is not taken.
        best: dict[int, tuple[int, int, list[int]]] = {head: self._score(head, (0, 0, []))}
        ends = []
        for block in sorted(inside):
            if block not in best:
                continue
            for other in self.successors[block]:
                if other == head:
                    ends.append(best[block])
                elif other in inside and other > block:
                    score = self._score(other, best[block])
                    if other not in best or score[:2] > best[other][:2]:
                        best[other] = score
        path = max(ends, key=lambda score: score[:2])[2]
        return [instruction for block in path for instruction in self.blocks[block]]

    def _score(self, block: int, before: tuple[int, int, list[int]]) -> tuple[int, int, list[int]]:
        tensor = sum(map(is_tensor, self.blocks[block]))
        others = len(self.blocks[block]) - tensor
        return before[0] + tensor, before[1] - others, [*before[2], block]


def resident_blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    shared_bytes, warps, slots = LIMITS[arch]
    block_warps = -(-threads // 32)
    register_units = -(-registers * 32 // 256) * 256 * block_warps
    return min(65536 // register_units, shared_bytes // (shared + 1024), warps // block_warps, slots)


def row(kernel: Kernel, name: str, threads: int, shared: int) -> list[str]:
    """The cells of one kernel's line."""
    shared += kernel.static_shared
    cells = [name, kernel.registers, f"{num_spills(kernel)} / {kernel.stack} B", f"{shared / 1024:.1f} KiB"]
    cells.append(resident_blocks(kernel.arch, kernel.registers, threads, shared))
    path = Flow(kernel.code).hot_path()
    if not path:
        return [*map(str, cells), "", "", "", ""]
    tensor = sum(map(is_tensor, path))
    matrices = sum(
        int(i.opcode.rsplit(".", 1)[1]) for i in path if re.fullmatch(r"LDSM\.16\.MT?88\.\d", i.opcode)
    )
    matrices += sum(re.fullmatch(r"LDSM\.16\.MT?88", i.opcode) is not None for i in path)
    powers = sum(i.opcode.startswith("MUFU") for i in path)
    busy = tensor * TENSOR_CYCLES[kernel.arch]
    share = busy / max(busy, len(path), 4 * matrices, 8 * powers)
    return [*map(str, cells), str(tensor), str(len(path) - tensor), str(matrices), f"{share:.0%}"]


def readable(part: str) -> str:
    """A kernel's name for people, of a part of its symbol."""
    size = re.search(r"Li(\d+)E", part)
    dtype = "bf16" if "BFloat16" in part else "fp16" if "Float16" in part else "fp32"
    if "allreduce" in part:
        return f"all-reduce{' residual rms_norm' if 'rms_norm' in part else ''} {dtype}"
    if not size:
        return re.sub(r"^\d*attention_|_kernel$", "", part).replace("_", " ")
    flags = re.findall(r"Lb([01])E", part)
    if "backward" in part:
        words = ["backward", "dk dv" if flags == ["1"] else "dq", dtype, f"head {size[1]}"]
    else:
        few_rows, modified = (flag == "1" for flag in flags) if flags else (False, False)
        words = [
            "forward",
            dtype,
            f"head {size[1]}",
            *(["few rows"] if few_rows else ["any scores"] if modified else []),
        ]
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--kernel", nargs="+", default=[], help="words that a kernel's name must hold")
    arguments = parser.parse_args()
    try:
        from pypar import _cuda
    except ImportError as error:
        sys.exit(
            f"pypar._cuda is not there ({error}): install pypar where nvcc is found, or with PYPAR_CUDA=1"
        )
    facts = [
        fact
        for name in sorted(dir(_cuda))
        if name.endswith("_kernels")
        for fact in getattr(_cuda, name)()
        if all(word in readable(fact[0]).split() for word in arguments.kernel)
    ]
    kernels = list(read_kernels(Path(_cuda.__file__), arguments.arch))
    print("Compile-time facts, read from the machine code; nothing here was measured on a GPU.")
    for arch in arguments.arch:
        print(f"\n{arch}\n")
        print("| kernel | registers | spills | shared | blocks | tensor | other | 8x8 reads | tensor share |")
        print("|---|---|---|---|---|---|---|---|---|")
        for part, threads, shared in facts:
            for kernel in (k for k in kernels if k.arch == arch and part in k.symbol):
                print(f"| {' | '.join(row(kernel, readable(part), threads, shared))} |")


if __name__ == "__main__":
    main()
