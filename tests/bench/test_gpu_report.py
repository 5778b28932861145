"""bench/gpu_report.py has a line for each kernel of an operator on rows, and counts what it moves."""

import subprocess
import sys

import pytest

from pypar.bench.gpu.machine_code import find_tool
from pypar.ops.backend.gpu import TRITON_MISSING
from tests import ROOT

REPORT = [sys.executable, str(ROOT / "bench" / "gpu_report.py"), "--arch", "sm_90a"]


@pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))
@pytest.mark.skipif(find_tool("cuobjdump") is None, reason="cuobjdump comes with Triton or the CUDA toolkit")
def test_a_line_for_each_kernel():
    found = subprocess.run(
        [*REPORT, "--kernel", "rms_norm", "forward"], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    rows = [line.strip("| ").split(" | ") for line in found.stdout.splitlines() if "| rms_norm |" in line]
    code, moved = rows
    assert code[3].endswith("_kernel") and code[6] == "0 / 0 B" and int(code[8]) > 0
    assert moved[2] == "forward" and 1 <= float(moved[5]) < 1.05
