"""What the compiled GPU kernels promise, found out without a GPU: markdown tables per architecture.

    python bench/gpu_report.py [--arch sm_80 ...] [--kernel head 128 bf16]

First the kernels of CUDA C++, of which all cells are told. Needs pypar._cuda (nvcc at installation) and Triton's wheel,
for its cuobjdump. Then Triton's kernels of operators but attention, compiled here for the first of their
compiled_cases, and the bytes that they move for the first of their small_cases (else kernel_cases), counted in Triton's
interpreter, beside the least: inputs and outputs, each once, and gradients in backward. linear_cross_entropy's kernels
stand between products; their least is what they touch, each once each way.

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
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from pypar.bench.gpu.flow import Flow
from pypar.bench.gpu.machine_code import (
    LIMITS,
    Kernel,
    find_tool,
    is_tensor,
    num_spills,
    read_kernels,
    resident_blocks,
)

# Cycles of a scheduler's tensor pipe for one m16n8k16, 2048 multiply-adds, from the dense bf16 rates with fp32 sums
# that NVIDIA states: A100 312, H100 989, RTX 5090 209.5 TFLOP/s. sm_100's tensor memory is out of mma.sync's reach;
# it is taken to be as fast as sm_90 without.
TENSOR_CYCLES = {"sm_80": 8, "sm_90a": 4, "sm_100a": 4, "sm_120": 32}
DIRECTIONS = ("forward", "backward")


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


def cuda_tables(archs: list[str], words: list[str]) -> Iterator[str]:
    try:
        from pypar import _cuda
    except ImportError as error:
        yield f"CUDA C++: pypar._cuda is not there ({error}); install pypar where nvcc is found, or with PYPAR_CUDA=1"
        return
    facts = [
        fact
        for name in sorted(dir(_cuda))
        if name.endswith("_kernels")
        for fact in getattr(_cuda, name)()
        if all(word in readable(fact[0]).split() for word in words)
    ]
    kernels = list(read_kernels(Path(_cuda.__file__), archs)) if facts else []
    for arch in archs:
        yield f"\n{arch}, CUDA C++\n"
        yield "| kernel | registers | spills | shared | blocks | tensor | other | 8x8 reads | tensor share |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for part, threads, shared in facts:
            for kernel in (k for k in kernels if k.arch == arch and part in k.symbol):
                yield f"| {' | '.join(row(kernel, readable(part), threads, shared))} |"


def triton_tables(archs: list[str], words: list[str]) -> Iterator[str]:
    from pypar.bench.gpu.triton_code import compile_launch, machine_code
    from pypar.selftest.row_kernels import cases_module, launches_of, operators

    launches = {
        (op, case.shape, direction, launch.kernel.__name__): launch
        for op in operators("compiled_cases")
        for case in cases_module(op).compiled_cases()[:1]
        for direction, several in zip(DIRECTIONS, launches_of(case, torch.bfloat16), strict=True)
        for launch in several
        if all(word in (op, direction) for word in words)
    }
    for arch in archs:
        yield f"\n{arch}, Triton, bf16\n"
        yield "| operator | shape | direction | kernel | threads | registers | spills | shared | blocks |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for names, launch in launches.items():
            with tempfile.TemporaryDirectory() as folder:
                compiled = compile_launch(launch, int(re.findall(r"\d+", arch)[0]))
                code = machine_code(compiled, Path(folder))
            threads = 32 * launch.num_warps
            cells = [*names, threads, code.registers, f"{code.spills} / {code.stack_bytes} B"]
            cells.append(f"{code.shared_bytes / 1024:.1f} KiB")
            cells.append(resident_blocks(arch, code.registers, threads, code.shared_bytes))
            yield f"| {' | '.join(map(str, cells))} |"


def moved_table(words: list[str]) -> Iterator[str]:
    """Of another process: this one has the kernels compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--moved", "--kernel", *words]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    yield "\nBytes moved, Triton, fp32\n"
    yield "| operator | case | direction | moved | least | moved / least |"
    yield "|---|---|---|---|---|---|"
    for op, case, direction, moved, least in json.loads(found):
        yield f"| {op} | {case} | {direction} | {moved:,} | {least:,} | {moved / least:.2f} |"


def moved(words: list[str]) -> list[tuple[str, str, str, int, int]]:
    """(operator, case, direction, bytes moved, least bytes), where Triton interprets."""
    from pypar.bench.gpu.moved import count
    from pypar.selftest.judge import expect_case
    from pypar.selftest.row_kernels import cases_module, launches_of, operators
    from pypar.selftest.rows import least_bytes

    rows = []
    for op in operators("compiled_cases"):
        if not any(all(word in (op, direction) for word in words) for direction in DIRECTIONS):
            continue
        module = cases_module(op)
        case = getattr(module, "small_cases" if hasattr(module, "small_cases") else "kernel_cases")()[0]
        leasts = least_bytes(case, expect_case(case, "cpu", torch.float32)[0])
        directions = zip(DIRECTIONS, launches_of(case, torch.float32), leasts, strict=True)
        for direction, launches, least in directions:
            if launches and all(word in (op, direction) for word in words):
                found = [x for launch in launches for x in count([launch])]
                total = sum(x.num_moved * x.element_bytes for x in found)
                if op == "linear_cross_entropy":
                    least = sum(x.num_touched * x.element_bytes for x in found)
                rows.append((op, f"{case.shape}, {case.name}", direction, total, least))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--kernel", nargs="*", default=[], help="words that a kernel's name must hold")
    parser.add_argument("--moved", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.moved:
        print(json.dumps(moved(arguments.kernel)))
        return
    if find_tool("cuobjdump") is None:
        sys.exit("cuobjdump not found: it comes with Triton (pip install triton) or the CUDA toolkit")
    print("Compile-time facts, read from the machine code; nothing here was measured on a GPU.")
    for lines in (
        cuda_tables(arguments.arch, arguments.kernel),
        triton_tables(arguments.arch, arguments.kernel),
        moved_table(arguments.kernel),
    ):
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
