"""CUDA kernels on the CPU under AddressSanitizer and UBSan: silent where they are right, faults are found."""

import subprocess
import sys

import pytest

from tests import ROOT
from tests.harness.simt.build import prepare_kernels, sanitizer_environment, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Each ends the process, so it runs in a child.
FAULTS = {
    ("vector_add", "OUT_OF_BOUNDS"): "heap-buffer-overflow",
    ("block_sum", "SHARED_OUT_OF_BOUNDS"): "index 4 out of bounds|global-buffer-overflow",
    ("tile_product", "ROW_OUT_OF_BOUNDS"): "use-after-poison",
    ("warp_operations", "LOCAL_ARRAY"): "index 4 out of bounds|stack-buffer-overflow",
}
PROGRAM = """
import os, torch
torch.set_num_threads(1)  # children have no threads
from tests.harness.simt.build import kernel_module
from tests.gpu.simt.test_kernels import RUNS
module = kernel_module("sanitized")
for run in RUNS.values():
    run(module)
print("all silent", flush=True)
for kernel, fault in {faults}:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{folder}/{{kernel}}-{{fault}}", os.O_WRONLY | os.O_CREAT), 2)
        os.environ["PYPAR_FAULT"] = fault
        RUNS[kernel](module)
        os._exit(0)
    print(kernel, fault, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_kernels_under_the_sanitizers(tmp_path):
    prepare_kernels("sanitized")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(faults=list(FAULTS), folder=tmp_path)],
        capture_output=True,
        text=True,
        env=sanitizer_environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "all silent"
    for (kernel, fault), message in FAULTS.items():
        report = (tmp_path / f"{kernel}-{fault}").read_text()
        assert any(part in report for part in message.split("|")), f"{kernel} {fault}: {report}"
        assert f"{kernel}.cu:" in report
        assert f"{kernel} {fault} 1" in lines
